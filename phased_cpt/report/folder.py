"""What stands in a run folder, as far as it can be read: a run may be under way, be older, or have been cut short.

run.json ─ phases ─┬─ best_*/source.json   what it published, its first and last held-out figures
                   ├─ logs/*.jsonl         every step, every evaluation
                   └─ data.json, samples.json, gate.json, eval_final.json
forgetting.json, config_resolved.yaml
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from phased_cpt.errors import PhasedCptError
from phased_cpt.ledger import RunRecord, holder_of, read_record
from phased_cpt.published import FOLDERS, MARKER
from phased_cpt.report.logs import Line, lines_of, moment, number
from phased_cpt.run_dir import GATE, RunDir

LARGEST_BYTES = 64_000_000  # of a JSON file that is looked into

Facts = dict[str, Any]


@dataclass(frozen=True)
class FoundPhase:
    """One phase, as far as anything is known of it."""

    number: int
    name: str
    state: str  # pending, running, interrupted, done
    settings: Facts  # its own keys: description, max_steps …
    record: Facts
    source: Facts  # what its published weights say of themselves
    final: Facts
    data: Facts
    samples: Facts
    gate: Facts
    train: list[Line]
    evaluations: list[Line]
    replayed: list[float]  # moments of steps that a later attempt took again
    begins: list[float]  # of all attempts of the run

    @property
    def steps(self) -> float | None:
        """How many it has, or was planned to have."""
        return next(filter(None, map(number, (self.source.get("steps"), self.data.get("steps"), self._budget))), None)

    @property
    def _budget(self) -> Any:
        return self.settings.get("max_steps")

    @property
    def step(self) -> float:
        """The last that is known to be taken."""
        return float(self.train[-1]["step"]) if self.train else number(self.source.get("steps")) or 0.0

    @property
    def start(self) -> Facts:
        """The held-out figures before step 0."""
        found = self.source.get("start") or self.final.get("start") or self._evaluated(first=True)
        return found if isinstance(found, dict) else {}

    @property
    def end(self) -> Facts:
        """Those of what is published; while it runs, the newest."""
        found = self.source.get("end") or self.final or self._evaluated(first=False)
        return found if isinstance(found, dict) else {}

    @property
    def seconds(self) -> float | None:
        """Of training: as published, or so far."""
        if (told := number(self.source.get("seconds"))) is not None:
            return told
        pairs = itertools.pairwise(self.moments)
        at_work = [after - before for before, after in pairs if not any(before < at <= after for at in self.begins)]
        return sum(at_work) if at_work else None

    @property
    def tokens(self) -> float | None:
        return number(self.source.get("tokens")) or (number(self.train[-1].get("tokens_seen")) if self.train else None)

    @cached_property
    def moments(self) -> list[float]:
        """All signs of life in its logs, in order."""
        stamps = (moment(line.get("ts")) for line in (*self.train, *self.evaluations))
        return sorted([*(at for at in stamps if at is not None), *self.replayed])

    def own_evaluations(self) -> list[Line]:
        return [line for line in self.evaluations if line.get("dataset", self.name) == self.name]

    def _evaluated(self, first: bool) -> Facts:
        own = self.own_evaluations()
        if first:
            return own[0] if own and own[0]["step"] == 0 else {}
        return own[-1] if own and own[-1]["step"] > 0 else {}


@dataclass(frozen=True)
class Folder:
    """All that a report is made of."""

    root: Path
    name: str
    state: str  # not begun, running, interrupted, finished
    holder: str | None  # who is at work in it
    record: Facts
    phases: list[FoundPhase]
    forgetting: Facts
    resolved: str
    damages: list[str] = field(default_factory=list)  # what is there and cannot be read, a sentence each

    def value(self, path: str) -> Any:
        """A value of the configuration, as the run's first attempt had it."""
        values = self.record.get("values")
        return values.get(path) if isinstance(values, dict) else None

    @property
    def attempts(self) -> list[Facts]:
        return [each for each in self.record.get("attempts") or () if isinstance(each, dict)]


def read_folder(run_dir: RunDir, lines: Callable[[Path], list[Line]] = lines_of) -> Folder:
    """Whatever is there; what is not, or is damaged, is missing in the answer and never an error.

    `lines` says how much of each log is read.
    """
    damages: list[str] = []
    record = _record(run_dir, damages)
    holder = _holder(run_dir, damages)
    facts: Facts = record.model_dump(mode="json") if record else {}
    listed = facts.get("phases") or [
        {"name": path.name.partition("_")[2], "folder": path.name, "state": "running"}
        for path in run_dir.phase_folders()
    ]
    written = [each for each in (facts.get("config") or {}).get("phases") or () if isinstance(each, dict)]
    settings = {each.get("name"): each for each in written}
    begins = sorted(filter(None, (moment(each["started"]) for each in facts.get("attempts") or ())))
    return Folder(
        root=run_dir.root,
        name=facts.get("name") or run_dir.root.resolve().name,
        state=_state(record, holder),
        holder=holder,
        record=facts,
        phases=[
            _phase(
                at, each, settings.get(each["name"], {}), run_dir.root / each["folder"], holder, begins, lines, damages
            )
            for at, each in enumerate(listed, 1)
        ],
        forgetting=_json(run_dir.root / "forgetting.json", damages),
        resolved=_text(run_dir.config_resolved, damages),
        damages=damages,
    )


def _record(run_dir: RunDir, damages: list[str]) -> RunRecord | None:
    try:
        return read_record(run_dir)
    except PhasedCptError as error:
        damages.append(str(error))
        return None


def _holder(run_dir: RunDir, damages: list[str]) -> str | None:
    try:
        return holder_of(run_dir)
    except (PhasedCptError, OSError) as error:  # a file system without locks
        damages.append(f"Whether anybody is at work here cannot be seen: {error}.")
        return None


def _state(record: RunRecord | None, holder: str | None) -> str:
    """Finished also while its conductor still merges, and writes this."""
    if record is not None and record.phases and record.is_finished:
        return "finished"
    if holder:
        return "running"
    return "interrupted" if record is not None and record.begun else "not begun"


def _phase(
    at: int,
    record: Facts,
    settings: Facts,
    folder: Path,
    holder: str | None,
    begins: list[float],
    lines: Callable[[Path], list[Line]],
    damages: list[str],
) -> FoundPhase:
    sources = (_json(folder / place / MARKER, damages) for place in FOLDERS.values())
    replayed = (line for path in sorted(folder.glob("logs/replayed-*.jsonl")) for line in lines(path))
    stamps = (moment(line.get("ts")) for line in replayed)
    return FoundPhase(
        number=at,
        name=record["name"],
        state="interrupted" if record["state"] == "running" and not holder else record["state"],
        settings=settings,
        record=record,
        source=next(filter(None, sources), {}),
        final=_json(folder / "eval_final.json", damages),
        data=_json(folder / "data.json", damages),
        samples=_json(folder / "samples.json", damages),
        gate=record.get("gate") or _json(folder / GATE, damages),
        train=lines(folder / "logs" / "train.jsonl"),
        evaluations=lines(folder / "logs" / "eval.jsonl"),
        replayed=[stamp for stamp in stamps if stamp is not None],
        begins=begins,
    )


def _json(path: Path, damages: list[str]) -> Facts:
    """An object of a file; empty where there is none."""
    content = _bytes(path, damages)
    if content is None:
        return {}
    try:
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    damages.append(f"{path.parent.name}/{path.name}: damaged; what it would tell is missing here.")
    return {}


def _text(path: Path, damages: list[str]) -> str:
    return (_bytes(path, damages) or b"").decode(errors="replace")


def _bytes(path: Path, damages: list[str]) -> bytes | None:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            damages.append(f"{path.parent.name}/{path.name}: too large to be read here.")
            return None
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        damages.append(f"{path.parent.name}/{path.name}: cannot be read: {error.strerror}.")
        return None
