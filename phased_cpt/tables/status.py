"""What a person sees of a run folder, and the same facts for a program."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phased_cpt.ledger import PhaseRecord, RunRecord
from phased_cpt.run_dir import CHECKPOINTS, RunDir
from phased_cpt.sealed import CHECKPOINT, of_kind
from phased_cpt.tables.words import counted

STATE_STYLES = {"done": "green", "running": "yellow", "interrupted": "yellow", "finished": "green", "pending": "dim"}


def status_facts(run_dir: RunDir, record: RunRecord | None, holder: str | None) -> dict[str, Any]:
    """Where a run stands, for a program."""
    return {
        "run_dir": str(run_dir.root),
        "name": record.name if record else None,
        "state": _state(run_dir, record, holder),
        "holder": holder,
        "attempts": len(record.attempts) if record else 0,
        "phases": [
            phase.model_dump(mode="json")
            | {"state": _phase_state(phase, holder), "saved_step": _saved_step(run_dir, phase)}
            for phase in (record.phases if record else ())
        ],
    }


def status_table(run_dir: RunDir, record: RunRecord | None, holder: str | None) -> RenderableType:
    """Where a run stands, on one screen."""
    state = _state(run_dir, record, holder)
    heading = Text.assemble((str(run_dir.root), "bold"), ": ", (state, STATE_STYLES.get(state, "")))
    if holder:
        heading.append(f" ({holder})", style="dim")
    if record is None:
        return heading
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    for name in ("", "phase", "state", "started", "finished", "published"):
        table.add_column(name)
    for number, phase in enumerate(record.phases, start=1):
        table.add_row(str(number), *_phase_row(phase, holder, _saved_step(run_dir, phase)))
    moved = [name for name in (record.archiving.names if record.archiving else ()) if (run_dir.root / name).exists()]
    note = f"moves to archive/{record.archiving.number}: {', '.join(moved)}" if record.archiving and moved else ""
    attempts = f"{counted(len(record.attempts), 'attempt')}, the first on {record.created}"
    return Group(heading, Text(attempts, style="dim"), "", table, *filter(None, [note]))


def _saved_step(run_dir: RunDir, phase: PhaseRecord) -> int | None:
    """Of the newest checkpoint of a phase under way, whole or not: that is seen when it is gone on from."""
    found = of_kind(run_dir.root / phase.folder / CHECKPOINTS, CHECKPOINT) if phase.state == "running" else []
    return found[0][0] if found else None


def _phase_row(phase: PhaseRecord, holder: str | None, saved_step: int | None) -> tuple[str | Text, ...]:
    state = _phase_state(phase, holder)
    published = f"{phase.published.kind} {phase.published.digest[:12]}" if phase.published else ""
    shown = Text(state, style=STATE_STYLES[state])
    shown.append(f", step {saved_step} saved" if saved_step else "")
    return phase.name, shown, phase.started or "", phase.finished or "", published


def _phase_state(phase: PhaseRecord, holder: str | None) -> str:
    return "interrupted" if phase.state == "running" and not holder else phase.state


def _state(run_dir: RunDir, record: RunRecord | None, holder: str | None) -> str:
    if holder:
        return "running"
    if record is None and run_dir.phase_folders():
        return "run.json is gone"
    if record is None or all(phase.state == "pending" for phase in record.phases):
        return "not begun"
    return "finished" if record.is_finished else "interrupted"
