"""A phase from outside: what it starts from, its job tried until it has published, what it has published entered.

start ─ inputs ─ done already? ─ job of fresh processes ─ published? ─ ledger          resumed where it was stopped
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from phased_cpt.bases import Base
from phased_cpt.data.prepare import cache_folder
from phased_cpt.data.prepared import PreparedRun
from phased_cpt.doors import Door
from phased_cpt.errors import GateClosed, InputError, Interrupted, PhasedCptError
from phased_cpt.fitting import remember_speed
from phased_cpt.handover import clear_superseded, merged_base, require_base
from phased_cpt.job import Job, Start
from phased_cpt.ledger import Adapter, Inputs, Ledger, Weights, require_no_ranks
from phased_cpt.ledger.fingerprint import digest_of
from phased_cpt.matrix import measure_of, write_forgetting
from phased_cpt.nodes.identity import versions
from phased_cpt.plan import PhasePlan, Plan, Wanted
from phased_cpt.published import published_weights, read_source, require_published
from phased_cpt.report import write_report
from phased_cpt.run_dir import CARRIED, CHECKPOINTS, DATA, GATE, publish_file
from phased_cpt.sealed import Sealed, clear_after, fault_of, found_in, named, newest
from phased_cpt.stopping import Stopping
from phased_cpt.tables.data import phase_facts
from phased_cpt.tables.forgetting import read_forgetting

BACK_OFF_SECONDS = 5.0  # times the tries so far


class TriedAgain(Exception):  # noqa: N818
    """The gate of a phase has closed, and the ledger says that it is to be trained again, otherwise."""


@dataclass(frozen=True)
class Run:
    """What a run stands on while it is conducted."""

    plan: Plan
    prepared: PreparedRun
    base: Base
    files: dict[str, dict[str, Any]]  # the filled DeepSpeed file of each phase
    ledger: Ledger
    signature: str
    door: Door
    wanted: Wanted
    half_done: str | None  # the phase that an earlier call has left
    stop: Stopping
    tell: Callable[[str], None]

    @property
    def root(self) -> Path:
        return self.ledger.run_dir.root.resolve()

    def start_of(self, phase: PhasePlan) -> Weights:
        """The base; or what the phase before has published, as it hands that over."""
        if phase.number == 1:
            return self.base.weights
        before, records = self.plan.phases[phase.number - 2], self.ledger.record.phases
        record = self.ledger.record.phase(before.name)
        if phase.start.form != "merged" or record.published is None or record.published.kind == "base":
            return self.ledger.published_by(before)
        if record.handed_over is not None:
            clear_superseded(self.root, records, record)
            return record.handed_over
        self.stop.require_on()
        self.tell(f"merging what {before.name} has published into the base of {phase.name}")
        weights = merged_base(self.plan, self.root, self.base, record, records)
        self.ledger.hand_over(before, weights)
        clear_superseded(self.root, records, record)
        return weights

    def inputs(self, phase: PhasePlan, start: Weights) -> Inputs:
        """What a phase is made of, besides its plan."""
        prepared = self.prepared.phase(phase.name)
        deciding = {
            f"best_of.{name}": self.prepared.held_out(name).index.folder.name
            for name in phase.settings.evaluation.best_of
            if name != phase.name
        }
        carried = {"optimizer": self._carried_digest(phase)} if phase.carries else {}
        return Inputs(
            start=start,
            tokenizer=self.prepared.tokenizer.digest,
            sources=prepared.source_digests | deciding | carried,
            execution={**versions(), "deepspeed": self.files[phase.name]},
        )

    def phase(self, phase: PhasePlan, inputs: Inputs, steps_before: int) -> int:
        """Train a phase, and enter what it has published; or only that, if its end was all that was lost.

        Returns the steps that were taken; `steps_before` were, in this call.
        """
        self.stop.require_on()
        if require_base(self.plan, self.root, self.base, inputs.start, self.ledger.record.phases):
            self.tell(f"the merged base of {phase.name} was made once more")
        require_published(self.root, inputs.start)
        self.ledger.begin(phase, inputs)
        fingerprint = self.ledger.fingerprint(phase)
        there, steps = self._published(phase, inputs.start, fingerprint), 0
        if there is None:
            there, steps = self._trained(phase, inputs.start, fingerprint, steps_before)
        found = read_source(self.root / phase.folder)
        self.ledger.publish(phase, there, found[1].gate if found else None)
        self.ledger.require_done(phase)
        if not self.wanted.smoke and found:
            remember_speed(phase, self.base, cache_folder(self.plan), found[1].steps, found[1].seconds)
        return steps

    def _published(self, phase: PhasePlan, start: Weights, fingerprint: str) -> Weights | None:
        return published_weights(self.root, phase.folder, fingerprint, start, _below(phase, start))

    def report(self, *, anew: bool = True) -> None:
        """forgetting.json and report.html, as far as the run has come; what goes wrong with them stops nothing.

        Not `anew`: the page is written where there is none, or more is known than when it was.
        """
        run_dir = self.ledger.run_dir
        try:
            before = read_forgetting(run_dir)
            write_forgetting(self.plan, self.prepared, self.root, cache_folder(self.plan))
            if anew or read_forgetting(run_dir) != before or not run_dir.report.exists():
                write_report(run_dir)
        except Exception as error:
            self.tell(f"no report: {type(error).__name__}: {error}; `phased-cpt report` tries again")

    def clear(self, phase: PhasePlan) -> None:
        """What a published phase was saved in on its way."""
        if not self.plan.config.checkpoint.keep_published:
            shutil.rmtree(self.root / phase.folder / CHECKPOINTS, ignore_errors=True)

    def _trained(self, phase: PhasePlan, start: Weights, fingerprint: str, steps_before: int) -> tuple[Weights, int]:
        """Trained, and let through by its gate; else what it forgot is in the ledger before anybody hears of it."""
        try:
            return self._train(phase, start, fingerprint, steps_before)
        except PhasedCptError as error:
            if error.exit_code != GateClosed.exit_code:
                raise
            verdict, gate = json.loads((self.root / phase.folder / GATE).read_bytes()), phase.phase.gate
            self.ledger.judged(phase, verdict)
            self.report()
            if gate is None or gate.on_fail != "retry_with_replay" or phase.phase.replay is not None:
                raise
            self.ledger.try_again(phase, gate.replay)
            again = f"{error}\ntrained again with {gate.replay:.1%} of the earlier phases (gate.on_fail)"
            if not self.door.starts_again:  # the other ranks have ended with this phase
                raise Interrupted(f"{again}, when the same command is called") from None
            self.tell(again)
            raise TriedAgain from None

    def _train(self, phase: PhasePlan, start: Weights, fingerprint: str, steps_before: int) -> tuple[Weights, int]:
        """Until it has published; a job that fails may be followed by others that go on where it was."""
        if self.wanted.steps_today is not None and steps_before >= self.wanted.steps_today:
            raise Interrupted(f"{steps_before} steps are taken, as --steps-today says; the same command goes on")
        resume = self.wanted.resume if phase.name == self.half_done else None
        first = begin = self._begin(phase, fingerprint, resume)
        for tries in count(1):
            failure = self._tried(phase, start, fingerprint, begin, steps_before - self._step_of(first))
            there = self._published(phase, start, fingerprint)
            if there is not None:
                found = read_source(self.root / phase.folder)
                return there, found[1].steps - self._step_of(first) if found else 0
            if failure is None:
                raise PhasedCptError(f"phase {phase.name} ended without publishing; see {phase.folder}/logs")
            if failure.exit_code != 1 or tries > self.plan.config.launch.retries or not self.door.starts_again:
                raise failure
            before, begin = begin, self._begin(phase, fingerprint, None)
            if self._step_of(begin) <= self._step_of(before):
                raise failure  # it would only fail there again
            self.tell(
                f"{failure}\ntried again by itself, {tries} of {self.plan.config.launch.retries} (launch.retries)"
            )
            time.sleep(BACK_OFF_SECONDS * tries)
        raise AssertionError("every try returns, raises or goes on")

    def _begin(self, phase: PhasePlan, fingerprint: str, wanted: str | None) -> Sealed | None:
        """The checkpoint that a phase goes on from; None: it begins."""
        folder = self.root / phase.folder / CHECKPOINTS
        if wanted == "none":
            found = None
        else:
            found = named(folder, fingerprint, wanted) if wanted else newest(folder, fingerprint, self.tell)
        clear_after(folder, self._step_of(found))
        return found

    def _step_of(self, sealed: Sealed | None) -> int:
        return sealed.manifest.step if sealed else 0

    def _tried(
        self, phase: PhasePlan, start: Weights, fingerprint: str, begin: Sealed | None, steps_before: int
    ) -> PhasedCptError | None:
        """One job of a phase; its failure is no proof that nothing was published."""
        require_no_ranks(self.ledger.run_dir)
        self.ledger.resumed(phase, self._step_of(begin))
        processes = f"{self.door.ranks} process{'es' if self.door.ranks > 1 else ''}"
        how = f"going on after step {self._step_of(begin)}" if begin else "starting"
        self.tell(f"phase {phase.number}/{len(self.plan.phases)} {phase.name}: {how} in {processes}")
        job = self.job(phase, start, fingerprint, begin, steps_before)
        job.write()
        facts = phase_facts(self.prepared, self.prepared.phase(phase.name))
        publish_file(self.root / phase.folder / DATA, json.dumps(facts, indent=1).encode())
        try:
            self.door.train(job, self.stop)
        except PhasedCptError as error:
            return error
        return None

    def job(self, phase: PhasePlan, start: Weights, fingerprint: str, begin: Sealed | None, steps_before: int) -> Job:
        splits = self.prepared.phase(phase.name).splits
        wandb = self.plan.config.tracking.wandb.enabled and not self.wanted.smoke
        today = self.wanted.steps_today
        return Job(
            run_dir=str(self.root),
            signature=self.signature,
            attempt=len(self.ledger.record.attempts),
            config=self.plan.config.model_dump(mode="json", exclude_unset=True),
            ranks=self.door.ranks,
            phase=phase.name,
            fingerprint=fingerprint,
            prepared={each.plan.name: astuple(each.epoch) for each in self.prepared.phases},
            train=str(splits["train"].index.folder.resolve()),
            evaluated=self._evaluated(phase),
            measure=measure_of(phase, self.plan, self.prepared, self.root),
            start=self._start(phase, start),
            deepspeed=self.files[phase.name],
            resume=str(begin.folder) if begin else None,
            begin=self._step_of(begin),
            stop_after=None if today is None else today - steps_before,
            wandb_id=self.ledger.wandb_id() if wandb else None,
            smoke=self.wanted.smoke,
        )

    def _evaluated(self, phase: PhasePlan) -> dict[str, str]:
        """What is measured as the phase goes: its own held-out documents, and what else decides which step is best."""
        own = [phase.name] if "eval" in self.prepared.phase(phase.name).splits else []
        names = dict.fromkeys([*own, *phase.settings.evaluation.best_of])
        return {name: str(self.prepared.held_out(name).index.folder.resolve()) for name in names}

    def _start(self, phase: PhasePlan, weights: Weights) -> Start:
        """The folders of what a phase starts from."""
        base = str(self.root / weights.folder) if weights.folder else self.base.folder
        shape = None if weights.folder else self.base.shape
        commit = None if weights.folder else self.base.commit
        below = _below(phase, weights)
        own = [self._place(each) for each in weights.adapters[len(below) :]]
        frozen = tuple(self._place(each) for each in below)
        carried = str(self._carried(phase).folder) if phase.carries else None
        return Start(base, shape, next(iter(own), None), weights.digest, weights.base, commit, frozen, carried)

    def _carried_digest(self, phase: PhasePlan) -> Any:
        """As it was, of a phase that is done: what it began with may be gone since."""
        record = self.ledger.record.phase(phase.name)
        if record.state == "done" and record.fingerprint and "optimizer" in record.fingerprint.parts:
            return record.fingerprint.parts["optimizer"]
        return digest_of(self._carried(phase).optimizer_files)

    def _carried(self, phase: PhasePlan) -> Sealed:
        """What the optimizer knew at the end of the phase before."""
        before = self.plan.phases[phase.number - 2]
        made_by = self.ledger.record.phase(before.name).fingerprint
        folder = self.root / before.folder / CARRIED
        assert made_by is not None  # the phase before is done
        if (fault := fault_of(folder, made_by.digest)) is not None:
            what = f"{folder}: what the optimizer of {before.name} knew cannot be carried on: {fault}"
            mend = f"train it again (`--redo-from {before.name}`), or set optimizer_at_start: reset in {phase.name}"
            raise InputError(f"{what}; {mend}")
        return found_in(folder)

    def _place(self, adapter: Adapter) -> str:
        return str(self.root / adapter.folder) if adapter.folder else str(self.base.adapter)


def _below(phase: PhasePlan, start: Weights) -> tuple[Adapter, ...]:
    """The adapters of a start that stay as they are: all of them under a fresh one, else all but the last."""
    return start.adapters if phase.settings.stacked else start.adapters[:-1]
