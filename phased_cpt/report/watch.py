"""`status --watch`: the run folder, live in a terminal, until nobody works in it any more.

demo: running (process 2788 on vm, since …)
  1 foundation  ━━━━━━━━━━━━━━━━━━━━  40 of 40   held-out loss 4.970 → 4.184
  2 evolution   ━━━━━━━━╸             18 of 40   loss 4.012, lr 3e-3, 5,120 tokens/s, 0:00:40 left
    held-out loss 4.201 at step 10 · step 18, forward (0.2 s ago)
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from phased_cpt.pulse import pulses
from phased_cpt.report.folder import Folder, FoundPhase, read_folder
from phased_cpt.report.forgotten import forgotten
from phased_cpt.report.logs import Line, last_line, number
from phased_cpt.report.written import clock_left, loss, rate, whole
from phased_cpt.run_dir import RunDir
from phased_cpt.tables.status import STATE_STYLES

LOOK_SECONDS, LINE_SECONDS = 1.0, 10.0


def watch(run_dir: RunDir) -> None:
    """Show how it comes along; Ctrl-C leaves, and the run does not notice."""
    console = Console(highlight=False, markup=False, emoji=False)
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal:
            _screen(run_dir, console)
        else:
            _lines(run_dir)


def newest(run_dir: RunDir) -> Folder:
    """The folder, with nothing of its logs but their ends."""
    return read_folder(run_dir, lambda path: list(filter(None, [last_line(path)])))


def _screen(run_dir: RunDir, console: Console) -> None:
    folder = newest(run_dir)
    with Live(screen_of(folder), console=console, auto_refresh=False) as live:
        console.show_cursor(True)  # rich hides it, and who is killed could not bring it back
        while folder.holder:
            time.sleep(LOOK_SECONDS)
            folder = newest(run_dir)
            live.update(screen_of(folder), refresh=True)


def _lines(run_dir: RunDir) -> None:
    """No terminal: a line now and then, and the last state in any case."""
    told = ""
    try:
        while True:
            folder = newest(run_dir)
            if (line := line_of(folder)) != told:
                told = line
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
            if not folder.holder:
                return
            time.sleep(LINE_SECONDS)
    except BrokenPipeError:  # `… --watch | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def line_of(folder: Folder) -> str:
    phase = under_way(folder)
    if phase is None:
        return f"{folder.name}: {folder.state}"
    where = f"phase {phase.number}/{len(folder.phases)} {phase.name}: step {_of(phase)}"
    figures = _figures(phase.train[-1]) if phase.train else ""
    return ", ".join(filter(None, [f"{folder.name}: {folder.state}, {where}", figures]))


def screen_of(folder: Folder) -> RenderableType:
    """All of it, on one screen."""
    heading = Text.assemble((folder.name, "bold"), ": ", (folder.state, STATE_STYLES.get(folder.state, "")))
    if folder.holder:
        heading.append(f" ({folder.holder})", style="dim")
    grid = Table.grid(padding=(0, 2, 0, 0))
    for is_narrow in (True, False, True, True, False):
        grid.add_column(no_wrap=is_narrow, overflow="fold")
    for phase in folder.phases:
        grid.add_row(str(phase.number), Text(phase.name, style="bold cyan"), _bar(phase), _of(phase), _told(phase))
    told = [Text(damage, style="yellow") for damage in folder.damages]
    return Group(heading, "", grid, *_beneath(folder), *_matrix(folder), *told)


def under_way(folder: Folder) -> FoundPhase | None:
    return next((phase for phase in folder.phases if phase.state in ("running", "interrupted")), None)


def _bar(phase: FoundPhase) -> ProgressBar:
    total = phase.steps or max(phase.step, 1.0)
    return ProgressBar(total=total, completed=total if phase.state == "done" else phase.step, width=16)


def _of(phase: FoundPhase) -> str:
    return f"{whole(phase.step)} of {whole(phase.steps)}" if phase.steps else whole(phase.step)


def _told(phase: FoundPhase) -> Text:
    if phase.state == "done":
        return Text(f"held-out loss {loss(phase.start.get('eval_loss'))} → {loss(phase.end.get('eval_loss'))}")
    if phase.state == "pending" or not phase.train:
        return Text(phase.state, style=STATE_STYLES[phase.state])
    return Text(_figures(phase.train[-1]) if phase.state == "running" else phase.state)


def _figures(line: Line) -> str:
    """One step, as train.jsonl has it."""
    told = [f"loss {loss(line.get('loss'))}", f"lr {rate(line.get('learning_rate'))}"]
    told.append(f"{whole(line.get('tokens_per_second'))} tokens/s")
    if (left := number(line.get("eta_seconds"))) is not None:
        in_all = number(line.get("curriculum_eta_seconds"))
        told.append(f"{clock_left(left)} left" + (f" ({clock_left(in_all)} of the curriculum)" if in_all else ""))
    return ", ".join(told)


def _beneath(folder: Folder) -> Iterator[Text]:
    """What is worth knowing of the phase under way: its last evaluation, and where its ranks are."""
    phase = under_way(folder)
    if phase is None:
        return
    told = [
        f"held-out loss {loss(each.get('eval_loss'))} of {each.get('dataset')} at step {whole(each['step'])}"
        for each in phase.evaluations
    ]
    beats = pulses(folder.root / str(phase.record.get("folder", "")) / "logs") if folder.holder else {}
    if beats:
        slowest = min(beats.values(), key=lambda pulse: pulse.at)
        ago = max(0.0, time.monotonic() - slowest.at)
        who = f"rank {slowest.rank}: " if len(beats) > 1 else ""
        told.append(f"{who}step {slowest.step}, {slowest.doing} ({ago:.0f} s ago)")
    if told:
        yield Text("\n" + " · ".join(told), style="dim")


def _matrix(folder: Folder) -> Iterator[RenderableType]:
    """The losses of the forgetting matrix, as far as they are measured; a damaged one is no matter of progress."""
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
        found = forgotten(folder)
        if not found["sets"]:
            return
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column("held-out loss after")
        for each in found["sets"]:
            table.add_column(each["name"], justify="right")
        for row in found["rows"]:
            cells = (Text(cell["loss"], style="bold green" if cell["best"] else "") for cell in row["cells"])
            table.add_row(row["name"], *cells)
        yield Group("", table)
