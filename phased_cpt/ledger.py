"""What is done, on disk, in run.json: which phases, from what, made of what, and what each published.

    pending ─ begin ─→ running ─ publish ─→ done
                          └──── the same fingerprint goes on; another one is refused, or redone on demand

Every change is one atomic file, so whoever reads it (status, the next attempt) sees a state that was true.
"""

import json
import os
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError

from phased_cpt import __version__
from phased_cpt.config.read import read_file
from phased_cpt.errors import InputError, LedgerRefuses, PhasedCptError
from phased_cpt.fingerprint import (
    Fingerprint,
    Inputs,
    Record,
    Weights,
    differences,
    fingerprint_of,
    told,
)
from phased_cpt.plan import PhasePlan, Plan
from phased_cpt.resolved import flat, resolved_values, resolved_yaml
from phased_cpt.run_dir import MADE_FROM_ALL_PHASES, RunDir, new_run_folder, publish_file, run_folders, sync_folder

FORMAT = 1
BATCH = "training.global_batch_size"  # not known to a plan that does not know the number of ranks yet
_RESOLVED_HEAD = (
    "# Every value of this run's first attempt; never rewritten (run.json has what later attempts changed)."
)


class PhaseRecord(Record):
    """One phase, as far as it has come."""

    name: str
    folder: str
    state: Literal["pending", "running", "done"] = "pending"
    fingerprint: Fingerprint | None = None
    execution: dict[str, JsonValue] = Field(default_factory=dict)
    started_from: Weights | None = None
    published: Weights | None = None
    started: str | None = None
    finished: str | None = None


class Attempt(Record):
    """One call of `run` on this folder."""

    started: str
    host: str
    pid: int
    version: str
    differences: dict[str, tuple[JsonValue, JsonValue]] = Field(
        default_factory=dict
    )  # to config_resolved.yaml, the first attempt's
    inexact: dict[str, tuple[JsonValue, JsonValue]] = Field(
        default_factory=dict
    )  # execution values changed under a half-done phase


class Archiving(Record):
    """A move into the archive that has been decided; whoever finds it finishes it."""

    number: int
    names: tuple[str, ...]


class RunRecord(Record):
    """run.json."""

    format: int = FORMAT
    name: str
    created: str
    phases: tuple[PhaseRecord, ...]
    attempts: tuple[Attempt, ...] = ()
    archiving: Archiving | None = None

    @property
    def is_finished(self) -> bool:
        return all(phase.state == "done" for phase in self.phases)

    def phase(self, name: str) -> PhaseRecord:
        return next(phase for phase in self.phases if phase.name == name)


# Reading -------------------------------------------------------------------------------------------------------------


def read_record(run_dir: RunDir) -> RunRecord | None:
    """The record of a folder; None where no run has begun in it yet."""
    try:
        raw = run_dir.ledger.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        content = json.loads(raw)
        if isinstance(content, dict) and content.get("format", 0) > FORMAT:
            raise PhasedCptError(
                f"{run_dir.ledger}: written by a newer phased_cpt (format {content['format']}); upgrade"
            )
        return RunRecord.model_validate(content)
    except (ValueError, TypeError, ValidationError):
        raise PhasedCptError(
            f"{run_dir.ledger}: damaged, this is no record of a run; restore it, or start another run with --new"
        ) from None


def choose_run_dir(plan: Plan, *, new: bool = False) -> RunDir:
    """run.dir, else the newest unfinished run of this name, else the newest finished one, else a new folder."""
    run = plan.config.run
    if run.dir is not None:
        chosen = RunDir(Path(run.dir))
        if new and read_record(chosen):
            raise InputError(
                f"--new: {run.dir} (run.dir) holds a run already; name another folder, or take run.dir out"
            )
        return chosen
    folders = [] if new else [RunDir(path) for path in run_folders(Path(run.output_dir), run.name)]
    unfinished = (folder for folder in folders if not ((record := read_record(folder)) and record.is_finished))
    return next(unfinished, folders[0] if folders else RunDir(new_run_folder(Path(run.output_dir), run.name)))


def newest_run(output_dir: Path) -> RunDir:
    """The newest run of any name, by the time in its folder's name."""
    runs = [path for path in output_dir.glob("*-????????_??????") if path.is_dir()]
    if not runs:
        raise InputError(f"no run in {output_dir}/ yet; name one with --run-dir")
    return RunDir(max(runs, key=lambda path: path.name[-15:]))


# The ledger ----------------------------------------------------------------------------------------------------------


class Ledger:
    """The record of one run, and the only one who writes it (its holder has the run lock)."""

    def __init__(self, run_dir: RunDir, record: RunRecord) -> None:
        self.run_dir = run_dir
        self.record = record

    @classmethod
    def open(cls, run_dir: RunDir, plan: Plan, *, redo_from: str | None = None) -> "Ledger":
        """Begin an attempt: the record is made, or held against the plan and gone on with."""
        record = read_record(run_dir)
        if record is None:
            if redo_from is not None:
                raise InputError(f"--redo-from: no run has begun in {run_dir.root}; leave it out")
            return cls._create(run_dir, plan)
        ledger = cls(run_dir, record)
        ledger._finish_archiving()  # of an attempt that died in the midst of it
        ledger.record = reconcile(ledger.record, plan, redo_from, _next_number(run_dir))
        ledger._write(attempts=(*ledger.record.attempts, ledger._attempt(plan)))
        ledger._finish_archiving()
        return ledger

    @classmethod
    def _create(cls, run_dir: RunDir, plan: Plan) -> "Ledger":
        run_dir.root.mkdir(parents=True, exist_ok=True)
        publish_file(run_dir.config_resolved, f"{_RESOLVED_HEAD}\n{resolved_yaml(plan)}".encode())
        ledger = cls(run_dir, RunRecord(name=plan.name, created=_now(), phases=_fresh(plan.phases)))
        ledger._write(attempts=(ledger._attempt(plan),))
        return ledger

    @property
    def is_finished(self) -> bool:
        return self.record.is_finished

    def is_done(self, phase: PhasePlan, inputs: Inputs) -> bool:
        """Whether the phase is published, from these very inputs; refuses where they are others."""
        record = self.record.phase(phase.name)
        if record.fingerprint is not None:
            _require_same(record, fingerprint_of(phase, inputs).parts)
        return record.state == "done"

    def begin(self, phase: PhasePlan, inputs: Inputs) -> None:
        """The phase runs from now on, or goes on."""
        if not self.is_done(phase, inputs) and self.record.phase(phase.name).state == "pending":
            self._change(
                phase,
                state="running",
                fingerprint=fingerprint_of(phase, inputs),
                execution=phase.values("execution"),
                started_from=inputs.start,
                started=_now(),
            )

    def publish(self, phase: PhasePlan, weights: Weights) -> None:
        """The phase is done: its weights are on disk, and this line makes them count."""
        self._change(phase, state="done", published=weights, finished=_now())

    def require_done(self, phase: PhasePlan) -> None:
        """An exit code of 0 is not proof; this is."""
        if self.record.phase(phase.name).state != "done":
            raise PhasedCptError(f"phase {phase.name} has ended without publishing anything; see {phase.folder}/logs")

    def published_by(self, phase: PhasePlan) -> Weights:
        weights = self.record.phase(phase.name).published
        if weights is None:
            raise PhasedCptError(f"phase {phase.name} has published nothing yet")
        return weights

    def _finish_archiving(self) -> None:
        """Move what an archiving names; a crash on the way leaves it in the record, and it is finished here."""
        if (archiving := self.record.archiving) is None:
            return
        target = self.run_dir.archive(archiving.number)
        target.mkdir(parents=True, exist_ok=True)
        for name in archiving.names:
            if (self.run_dir.root / name).exists():
                os.rename(self.run_dir.root / name, target / name)
        sync_folder(target)
        self._write(archiving=None)

    def _attempt(self, plan: Plan) -> Attempt:
        return Attempt(
            started=_now(),
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            differences=_since_first_attempt(self.run_dir, plan),
            inexact=_inexact(self.record.phases, plan),
        )

    def _change(self, phase: PhasePlan, **fields: Any) -> None:
        self._write(
            phases=tuple(old.model_copy(update=fields) if old.name == phase.name else old for old in self.record.phases)
        )

    def _write(self, **fields: Any) -> None:
        record = self.record.model_copy(update=fields)
        publish_file(self.run_dir.ledger, record.model_dump_json(indent=2).encode() + b"\n")
        self.record = record


# Plan against record -------------------------------------------------------------------------------------------------


def reconcile(record: RunRecord, plan: Plan, redo_from: str | None = None, archive_number: int = 0) -> RunRecord:
    """The record as it stands under this plan; refuses a plan whose beginning is not what was begun.

    New phases at the end are welcome. What is redone, and all that stands on it, is forgotten and marked for the
    archive; nothing is deleted.
    """
    begun = [phase for phase in record.phases if phase.state != "pending"]
    archiving = record.archiving
    if redo_from is not None:
        names = [phase.name for phase in record.phases]
        if redo_from not in names:
            raise InputError(f"--redo-from: this run has no phase {redo_from!r}; it has {', '.join(names)}")
        begun = begun[: names.index(redo_from)]
        left = [phase.folder for phase in record.phases[names.index(redo_from) :]]
        archiving = Archiving(number=archive_number, names=(*left, *MADE_FROM_ALL_PHASES))
    for old, planned in zip_longest(begun, plan.phases[: len(begun)]):
        _require_match(old, planned)
    return record.model_copy(update={"phases": (*begun, *_fresh(plan.phases[len(begun) :])), "archiving": archiving})


def _fresh(phases: Sequence[PhasePlan]) -> tuple[PhaseRecord, ...]:
    return tuple(PhaseRecord(name=phase.name, folder=phase.folder) for phase in phases)


def _require_match(old: PhaseRecord, planned: PhasePlan | None) -> None:
    if planned is None or planned.name != old.name:
        now = f"is {planned.name} now" if planned else "is gone"
        raise LedgerRefuses(f"{old.folder} was phase {old.name}, which {now}\n{_ways_out(old.name)}")
    if old.fingerprint is not None:
        known = {key: value for key, value in planned.values("recipe").items() if key != BATCH or value is not None}
        _require_same(old, old.fingerprint.parts | known)


def _require_same(record: PhaseRecord, now: dict[str, Any]) -> None:
    was = record.fingerprint.parts if record.fingerprint else now
    if found := differences(was, now):
        state = "is done" if record.state == "done" else "has begun"
        raise LedgerRefuses(
            f"phase {record.name} {state}, with other values than it has now:\n{told(found)}\n{_ways_out(record.name)}"
        )


def _ways_out(name: str) -> str:
    return (
        "put them back, start another run with `--new`, "
        f"or train it again with `--redo-from {name}` (what it made is archived)"
    )


def _since_first_attempt(run_dir: RunDir, plan: Plan) -> dict[str, tuple[Any, Any]]:
    first = read_file(run_dir.config_resolved).values if run_dir.config_resolved.exists() else {}
    return differences(flat(first), flat(resolved_values(plan)))


def _inexact(phases: Sequence[PhaseRecord], plan: Plan) -> dict[str, tuple[Any, Any]]:
    """What now runs in another way, in a phase that is half done: it goes on, but not to the same bits."""
    found: dict[str, tuple[Any, Any]] = {}
    for old in phases:
        if old.state == "running":
            now = plan.phase(old.name).values("execution")
            found |= {f"{old.name}.{key}": pair for key, pair in differences(old.execution, now).items()}
    return found


def _next_number(run_dir: RunDir) -> int:
    archive = run_dir.archive(0).parent
    taken = [int(path.name) for path in archive.iterdir() if path.name.isdecimal()] if archive.is_dir() else []
    return max(taken, default=0) + 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
