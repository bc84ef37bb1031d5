"""What the ranks are told of the phase that they train: one file, written by whoever conducts the run.

conductor ─ <phase folder>/job.json ─ every rank, which looks up nothing else
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phased_cpt.config import from_record
from phased_cpt.plan import PhasePlan, Plan, make_plan
from phased_cpt.run_dir import RunDir, publish_file
from phased_cpt.schedule import Prepared

SMOKE_STEPS = 2
SMOKE_EVAL_ROWS = 4


@dataclass(frozen=True)
class Start:
    """The weights that a phase starts from, as folders to be read."""

    base: str  # a folder; of random weights it is made by the ranks
    shape: dict[str, Any] | None  # of the random weights
    adapter: str | None  # that is trained further; a fresh one, without
    digest: str  # of it all
    base_digest: str
    commit: str | None = None  # of a base from the hub
    below: tuple[str, ...] = ()  # adapters that stay as they are
    optimizer: str | None = None  # what it knew at the end of the phase before, where that is carried on


@dataclass(frozen=True)
class Measure:
    """What is measured around a phase, besides its own held-out documents as it goes."""

    sets: dict[str, tuple[str, int]] = field(default_factory=dict)  # of the matrix: block index, rows at once
    before: bool = False  # row 0 of the matrix
    after: bool = False  # the row of what is published
    best_so_far: dict[str, float | None] = field(default_factory=dict)  # of each earlier set: for the gate
    prompts: int = 0  # that are continued, for the report


@dataclass(frozen=True)
class Job:
    """One phase, with all that its ranks need."""

    run_dir: str
    signature: str  # of the run lock
    attempt: int
    config: dict[str, Any]  # as it was written
    ranks: int
    phase: str
    fingerprint: str
    prepared: dict[str, tuple[int, int, float | None]]  # of each phase: see schedule.Prepared
    train: str  # the folder of its block index
    evaluated: dict[str, str]  # as it goes: the block index of each set of held-out rows
    start: Start
    deepspeed: dict[str, Any]  # filled
    measure: Measure = Measure()
    resume: str | None = None  # the checkpoint that it goes on from, and
    begin: int = 0  # its step
    stop_after: int | None = None  # step, of --steps-today
    wandb_id: str | None = None
    smoke: bool = False

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.run_dir))

    def plan(self) -> Plan:
        """The plan of the run, as the conductor has it."""
        prepared = {name: Prepared(*counts) for name, counts in self.prepared.items()}
        plan = make_plan(from_record(self.config, str(self.run.ledger)), self.ranks, prepared)
        return plan.smoke(SMOKE_STEPS) if self.smoke else plan

    def phase_plan(self) -> PhasePlan:
        return self.plan().phase(self.phase)

    @property
    def path(self) -> Path:
        return self.run.root / self.phase_plan().folder / "job.json"

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        publish_file(self.path, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, path: Path) -> "Job":
        return cls.parse(path.read_text())

    @classmethod
    def parse(cls, text: str) -> "Job":
        values = json.loads(text)
        start, measure = Start(**values["start"]), Measure(**values["measure"])
        return cls(**values | {"start": start, "measure": measure})

    def text(self) -> str:
        return json.dumps(asdict(self))
