"""The ledger: the only writer of run.json.

    pending ─ begin ─→ running ─ publish ─→ done
                          └──── the same fingerprint goes on; another one is refused, or redone on demand

Every change is one atomic file, so whoever reads it (status, the next attempt) sees a state that was true.
"""

import os
import secrets
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phased_cpt import __version__
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.ledger.choose import next_archive
from phased_cpt.ledger.fingerprint import Inputs, Weights, differences, fingerprint_of
from phased_cpt.ledger.match import fresh, reconcile, require_same
from phased_cpt.ledger.record import Archiving, Attempt, PhaseRecord, RunRecord, read_record
from phased_cpt.plan import PhasePlan, Plan
from phased_cpt.resolved import every_value, resolved_yaml
from phased_cpt.run_dir import MERGED_BASE, RunDir, publish_file, sync_folder

_RESOLVED_HEAD = (
    "# Every value of this run's first attempt; never rewritten (run.json has what later attempts changed)."
)


class Ledger:
    """The record of one run; its holder has the run lock."""

    def __init__(self, run_dir: RunDir, record: RunRecord) -> None:
        self.run_dir = run_dir
        self.record = record

    @classmethod
    def open(cls, run_dir: RunDir, plan: Plan, *, redo_from: str | None = None) -> "Ledger":
        """Begin an attempt: the record is made, or held against the plan and gone on with."""
        plan, record = plan.without_run_dir(), read_record(run_dir)
        if record is None:
            if redo_from is not None:
                raise InputError(f"--redo-from: no run has begun in {run_dir.root}; leave it out")
            return cls._create(run_dir, plan)
        ledger = cls(run_dir, record)
        ledger._finish_archiving()  # of an attempt that died in the midst of it
        ledger.record = reconcile(ledger.record, plan, redo_from, next_archive(run_dir))
        ledger._begin_attempt(plan)
        ledger._finish_archiving()
        return ledger

    @classmethod
    def _create(cls, run_dir: RunDir, plan: Plan) -> "Ledger":
        if run_dir.root.exists() and not run_dir.root.is_dir():
            raise InputError(f"{run_dir.root}: this is a file, and a run needs a folder; name another")
        run_dir.root.mkdir(parents=True, exist_ok=True)
        if left := run_dir.phase_folders():
            what = f"run.json is gone, but {', '.join(path.name for path in left)} has been trained here"
            raise PhasedCptError(f"{run_dir.root}: {what}; restore run.json, or start another run with --new")
        sync_folder(run_dir.root.parent)
        publish_file(run_dir.config_resolved, f"{_RESOLVED_HEAD}\n{resolved_yaml(plan)}".encode())
        values, phases = every_value(plan), fresh(plan.phases)
        ledger = cls(run_dir, RunRecord(name=plan.name, created=_now(), values=values, config={}, phases=phases))
        ledger._begin_attempt(plan)
        return ledger

    @property
    def is_finished(self) -> bool:
        return self.record.is_finished

    def is_done(self, phase: PhasePlan, inputs: Inputs) -> bool:
        """Whether the phase is published, from these very inputs; refuses where they are others."""
        record = self.record.phase(phase.name)
        try:
            if record.fingerprint is not None:
                require_same(record, fingerprint_of(phase, inputs).parts, phase)
            if record.published is not None:
                self._require_there(phase, record.published)
        except PhasedCptError:
            if self.record.redoing is not None:
                self._write(redoing=None)  # so that --redo-from, which the message advises, begins anew
            raise
        return record.state == "done"

    def begin(self, phase: PhasePlan, inputs: Inputs) -> None:
        """The phase runs from now on, or goes on: perhaps in another way, which is recorded."""
        execution = phase.values("execution") | inputs.execution
        record = self.record.phase(phase.name)
        if self.is_done(phase, inputs):
            return
        if record.state == "running":
            self._goes_on(phase, differences(record.execution, execution), execution)
            return
        if phase.number > 1:
            before = self.record.phases[phase.number - 2]
            if inputs.start.digest not in [each.digest for each in (before.published, before.handed_over) if each]:
                raise PhasedCptError(f"phase {phase.name} must start from what {before.name} published")
        self._change(
            phase,
            state="running",
            fingerprint=fingerprint_of(phase, inputs),
            execution=execution,
            started_from=inputs.start,
            started=_now(),
        )

    def publish(self, phase: PhasePlan, weights: Weights, gate: dict[str, Any] | None = None) -> None:
        """The phase is done: its weights are on disk, and this line makes them count."""
        if self.record.phase(phase.name).state != "running":
            raise PhasedCptError(f"phase {phase.name} is not running, so it has nothing to publish")
        if not (weights.folder if weights.kind == "base" else weights.adapters[-1].folder):
            raise PhasedCptError(f"phase {phase.name} publishes a {weights.kind}, but does not say where it lies")
        self._require_there(phase, weights)
        self._change(phase, state="done", published=weights, gate=gate, finished=_now())

    def require_done(self, phase: PhasePlan) -> None:
        """An exit code of 0 is not proof; what is on disk is, whoever wrote it."""
        self.record = read_record(self.run_dir) or self.record
        record = self.record.phase(phase.name)
        if record.state != "done" or record.published is None:
            raise PhasedCptError(f"phase {phase.name} has ended without publishing anything; see {phase.folder}/logs")
        self._require_there(phase, record.published)

    def published_by(self, phase: PhasePlan) -> Weights:
        weights = self.record.phase(phase.name).published
        if weights is None:
            raise PhasedCptError(f"phase {phase.name} has published nothing yet")
        return weights

    def judged(self, phase: PhasePlan, verdict: dict[str, Any]) -> None:
        """The phase is trained, and its gate does not let it be published."""
        self._change(phase, gate=verdict)

    def try_again(self, phase: PhasePlan, replay: float) -> None:
        """The phase begins anew, with so much of the earlier ones; what it has made goes to the archive."""
        gate = self.record.phase(phase.name).gate
        anew = PhaseRecord(name=phase.name, folder=phase.folder, gate=gate, replay_by_gate=replay)
        phases = tuple(anew if old.name == phase.name else old for old in self.record.phases)
        self._write(phases=phases, archiving=Archiving(number=next_archive(self.run_dir), names=(phase.folder,)))
        self._finish_archiving()

    def hand_over(self, phase: PhasePlan, weights: Weights) -> None:
        """What the next phase starts from, where that is not what was published."""
        self._change(phase, handed_over=weights)

    def fingerprint(self, phase: PhasePlan) -> str:
        """What the phase was begun as, which names all that it makes; an older version has made it of fewer keys."""
        fingerprint = self.record.phase(phase.name).fingerprint
        if fingerprint is None:
            raise PhasedCptError(f"phase {phase.name} has not begun")
        return fingerprint.digest

    def resumed(self, phase: PhasePlan, step: int) -> None:
        """A job of the phase begins, after this step."""
        *earlier, attempt = self.record.attempts
        attempt = attempt.model_copy(update={"resumed": attempt.resumed | {phase.name: step}})
        self._write(attempts=(*earlier, attempt))

    def wandb_id(self) -> str:
        """The name of this run at Weights & Biases, for good."""
        if self.record.wandb_id is None:
            self._write(wandb_id=secrets.token_hex(8))
        return str(self.record.wandb_id)

    def _require_there(self, phase: PhasePlan, weights: Weights) -> None:
        made_anew = Path(weights.folder).name == MERGED_BASE  # if it is wanted again
        folders = [*([] if made_anew else [weights.folder]), *(adapter.folder for adapter in weights.adapters)]
        if gone := [folder for folder in folders if folder and not (self.run_dir.root / folder).is_dir()]:
            mend = f"restore it, or train the phase again with `--redo-from {phase.name}`"
            raise PhasedCptError(f"phase {phase.name} published {', '.join(gone)}, which is not there; {mend}")

    def _goes_on(self, phase: PhasePlan, inexact: dict[str, tuple[Any, Any]], execution: dict[str, Any]) -> None:
        """Not to the same bits, where it now runs in another way."""
        if inexact:
            *earlier, attempt = self.record.attempts
            named = {f"{phase.name}.{key}": pair for key, pair in inexact.items()}
            attempt = attempt.model_copy(update={"inexact": attempt.inexact | named})
            self._change(phase, execution=execution, attempts=(*earlier, attempt))

    def _finish_archiving(self) -> None:
        """Move what an archiving names; a crash on the way leaves it in the record, and it is finished here."""
        if (archiving := self.record.archiving) is None:
            return
        target = self.run_dir.archive(archiving.number)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name in archiving.names:
                if os.path.lexists(self.run_dir.root / name):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    os.rename(self.run_dir.root / name, target / name)
            sync_folder(target)
            sync_folder(target.parent)
        except OSError as error:
            what = f"what is to be redone cannot be moved there: {error.strerror}"
            raise PhasedCptError(f"{target}: {what}; make room for it and call again") from error
        self._write(archiving=None)

    def _begin_attempt(self, plan: Plan) -> None:
        attempt = Attempt(
            started=_now(),
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            differences=differences(self.record.values, every_value(plan)),
        )
        written = plan.config.model_dump(mode="json", exclude_unset=True)
        self._write(attempts=(*self.record.attempts, attempt), config=written)

    def _change(self, phase: PhasePlan, attempts: tuple[Attempt, ...] | None = None, **fields: Any) -> None:
        phases = [old.model_copy(update=fields) if old.name == phase.name else old for old in self.record.phases]
        changed = self.record.model_copy(update={"phases": tuple(phases)})
        redoing = None if changed.is_finished else changed.redoing
        self._write(phases=changed.phases, redoing=redoing, attempts=attempts or changed.attempts)

    def _write(self, **fields: Any) -> None:
        record = self.record.model_copy(update=fields)
        publish_file(self.run_dir.ledger, record.model_dump_json(indent=2).encode() + b"\n")
        self.record = record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
