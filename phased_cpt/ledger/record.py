"""run.json: which phases, from what, made of what, and what each published."""

import json
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError

from phased_cpt.errors import PhasedCptError
from phased_cpt.ledger.fingerprint import Differences, Fingerprint, Record, Weights
from phased_cpt.run_dir import RunDir

FORMAT = 1


class PhaseRecord(Record):
    """One phase, as far as it has come."""

    name: str
    folder: str
    state: Literal["pending", "running", "done"] = "pending"
    fingerprint: Fingerprint | None = None
    execution: dict[str, JsonValue] = Field(default_factory=dict)
    started_from: Weights | None = None
    published: Weights | None = None
    handed_over: Weights | None = None  # merged, where the next phase starts from that
    gate: dict[str, JsonValue] | None = None  # its verdict
    replay_by_gate: float | None = None  # share of earlier phases in its second try
    started: str | None = None
    finished: str | None = None


class Attempt(Record):
    """One call of `run` on this folder."""

    started: str
    host: str
    pid: int
    version: str
    differences: Differences = Field(default_factory=dict)  # to the first attempt's values
    inexact: Differences = Field(default_factory=dict)  # execution values changed under a half-done phase
    resumed: dict[str, int] = Field(
        default_factory=dict
    )  # the phases that it trained, each with the step it began after


class Archiving(Record):
    """A move into the archive that has been decided; whoever finds it finishes it."""

    number: int
    names: tuple[str, ...]


class RunRecord(Record):
    """The whole file."""

    format: int = FORMAT
    name: str
    created: str
    values: dict[str, JsonValue]  # every value of the first attempt, as in config_resolved.yaml, which is never read
    config: dict[str, Any]  # what was written for the last attempt: the run goes on from its folder alone with it
    phases: tuple[PhaseRecord, ...]
    attempts: tuple[Attempt, ...] = ()
    redoing: str | None = None  # the --redo-from that is under way: the same command goes on with it
    archiving: Archiving | None = None
    wandb_id: str | None = None  # of the one run there, over all phases and attempts

    @property
    def is_finished(self) -> bool:
        return all(phase.state == "done" for phase in self.phases)

    @property
    def begun(self) -> tuple[PhaseRecord, ...]:
        return tuple(phase for phase in self.phases if phase.state != "pending")

    def phase(self, name: str) -> PhaseRecord:
        return {phase.name: phase for phase in self.phases}[name]


def read_record(run_dir: RunDir) -> RunRecord | None:
    """The record of a folder; None where no run has begun in it yet."""
    try:
        content = json.loads(run_dir.ledger.read_bytes())
        if isinstance(content, dict) and content.get("format", 0) > FORMAT:
            newer = f"written by a newer phased_cpt (format {content['format']}); upgrade to read it"
            raise PhasedCptError(f"{run_dir.ledger}: {newer}")
        return RunRecord.model_validate(content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise PhasedCptError(f"{run_dir.ledger}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError, ValidationError):
        damaged = "damaged, this is no record of a run; restore it, or start another run with --new"
        raise PhasedCptError(f"{run_dir.ledger}: {damaged}") from None
