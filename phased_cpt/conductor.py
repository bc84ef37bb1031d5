"""The story of a run: prepare, then phase after phase, each from what the one before has published.

Both doors come through here. `phased-cpt run` brings a launcher, which starts a job of fresh processes for a phase;
`deepspeed --module phased_cpt` brings the ranks that it is one of. Either way a phase is done when what it published
is there and is what it says, whatever any process returned.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from phased_cpt.bases import Base, find_base
from phased_cpt.config import Loaded, RunConfig, from_objects, load
from phased_cpt.config.allowed import nearest
from phased_cpt.data.prepare import cache_folder, prepare
from phased_cpt.data.prepared import PreparedRun
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.data.watch import Unwatched, Watcher
from phased_cpt.doors import Door, LaunchedJobs
from phased_cpt.errors import InputError, Interrupted, PhasedCptError
from phased_cpt.fitting import filled_file, remember_speed
from phased_cpt.job import SMOKE_STEPS, Job, Start
from phased_cpt.ledger import (
    Inputs,
    Ledger,
    Weights,
    choose_run_dir,
    next_archive,
    read_record,
    reconcile,
    require_no_ranks,
    run_lock,
)
from phased_cpt.ledger.fingerprint import fingerprint_of
from phased_cpt.merging import job_of_run, merge
from phased_cpt.nodes.identity import versions
from phased_cpt.plan import PhasePlan, Plan, Wanted, make_plan
from phased_cpt.published import MARKER, published_weights, read_source, require_published
from phased_cpt.run_dir import CHECKPOINTS, RunDir, copied, publish_file
from phased_cpt.sealed import Sealed, clear_after, named, newest
from phased_cpt.stopping import Stopping, heard

BACK_OFF_SECONDS = 5.0  # times the tries so far


Look = Callable[[PreparedRun, Plan], None]  # shows the user what is about to be trained


@dataclass(frozen=True)
class Outcome:
    """How far a call has brought the run."""

    run_dir: RunDir
    plan: Plan
    trained: tuple[str, ...]
    finished: bool


def train(config: RunConfig | Path | str, *, new: bool = False, wanted: Wanted | None = None) -> Outcome:
    """A run from Python: a configuration, or the path of one; the processes of each phase are started as ever."""
    loaded = from_objects(config) if isinstance(config, RunConfig) else load(Path(config).expanduser())
    plan = make_plan(loaded)
    run_dir = choose_run_dir(plan, new=new)
    return conduct(plan, run_dir, LaunchedJobs.of(plan), wanted or Wanted(), Unwatched(), lambda prepared, plan: None)


def conduct(plan: Plan, run_dir: RunDir, door: Door, wanted: Wanted, watcher: Watcher, look: Look) -> Outcome:
    """Bring a run to its end, or as far as is wanted; asked to stop, leave it so that the same call goes on."""
    with heard() as stop:
        if wanted.minutes:
            stop.stop_in(wanted.minutes * 60)
        return _conduct(plan, run_dir, door, wanted, watcher, look, stop)


def _conduct(
    plan: Plan, run_dir: RunDir, door: Door, wanted: Wanted, watcher: Watcher, look: Look, stop: Stopping
) -> Outcome:
    _require_phases(plan, wanted)
    half_done = _require_goes_on(run_dir, _counted(plan, door.ranks), wanted)
    _require_writable(run_dir)
    base = find_base(plan, run_dir.root.resolve(), cache_folder(plan), afresh=half_done is not None)
    files = {phase.name: filled_file(phase, base) for phase in _counted(plan, door.ranks).phases}
    prepared = prepare(plan, watcher)  # hours, it may be; what is wrong above is told before
    base.require_ids(prepared.tokenizer.vocabulary, prepared.tokenizer.name)
    plan = _counted(plan, door.ranks, prepared)
    plan = plan.smoke(SMOKE_STEPS) if wanted.smoke else plan
    look(prepared, plan)
    with run_lock(run_dir) as signature:
        ledger = Ledger.open(run_dir, plan, redo_from=wanted.redo_from)
        if done := [phase.name for phase in ledger.record.phases if phase.state == "done"]:
            watcher.tell(f"going on in {run_dir.root}: {', '.join(done)} done already")
        run = Run(plan, prepared, base, files, ledger, signature, door, wanted, half_done, stop, watcher.tell)
        _keep_tokenizer(run_dir, prepared.tokenizer)
        start, trained, steps = base.weights, [], 0
        for phase in plan.phases[: _index(plan, wanted.last, len(plan.phases)) + 1]:
            inputs = run.inputs(phase, start)
            if not ledger.is_done(phase, inputs):
                steps += run.phase(phase, inputs, steps)
                trained.append(phase.name)
            run.clear(phase)
            start = ledger.published_by(phase)
        if ledger.is_finished:
            _keep_final(run)
            if plan.config.merge.enabled and not wanted.smoke:
                _merge_last(run)
    return Outcome(run_dir, plan, tuple(trained), ledger.is_finished)


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

    def inputs(self, phase: PhasePlan, start: Weights) -> Inputs:
        """What a phase is made of, besides its plan."""
        return Inputs(
            start=start,
            tokenizer=self.prepared.tokenizer.digest,
            sources=self.prepared.phase(phase.name).source_digests,
            execution={**versions(), "deepspeed": self.files[phase.name]},
        )

    def phase(self, phase: PhasePlan, inputs: Inputs, steps_before: int) -> int:
        """Train a phase, and enter what it has published; or only that, if its end was all that was lost.

        Returns the steps that were taken; `steps_before` were, in this call.
        """
        self.stop.require_on()
        require_published(self.root, inputs.start)
        self.ledger.begin(phase, inputs)
        fingerprint = fingerprint_of(phase, inputs).digest
        there, steps = published_weights(self.root, phase.folder, fingerprint, inputs.start), 0
        if there is None:
            there, steps = self._train(phase, inputs.start, fingerprint, steps_before)
        self.ledger.publish(phase, there)
        self.ledger.require_done(phase)
        if not self.wanted.smoke and (found := read_source(self.root / phase.folder)):
            remember_speed(phase, self.base, cache_folder(self.plan), found[1].steps, found[1].seconds)
        return steps

    def clear(self, phase: PhasePlan) -> None:
        """What a published phase was saved in on its way."""
        if not self.plan.config.checkpoint.keep_published:
            shutil.rmtree(self.root / phase.folder / CHECKPOINTS, ignore_errors=True)

    def _train(self, phase: PhasePlan, start: Weights, fingerprint: str, steps_before: int) -> tuple[Weights, int]:
        """Until it has published; a job that fails may be followed by others that go on where it was."""
        if self.wanted.steps_today is not None and steps_before >= self.wanted.steps_today:
            raise Interrupted(f"{steps_before} steps are taken, as --steps-today says; the same command goes on")
        resume = self.wanted.resume if phase.name == self.half_done else None
        first = begin = self._begin(phase, fingerprint, resume)
        for tries in count(1):
            failure = self._tried(phase, start, fingerprint, begin, steps_before - self._step_of(first))
            there = published_weights(self.root, phase.folder, fingerprint, start)
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
        job = self._job(phase, start, fingerprint, begin, steps_before)
        job.write()
        try:
            self.door.train(job, self.stop)
        except PhasedCptError as error:
            return error
        return None

    def _job(self, phase: PhasePlan, start: Weights, fingerprint: str, begin: Sealed | None, steps_before: int) -> Job:
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
            prepared={each.plan.name: (each.epoch.blocks, each.epoch.tokens_trained) for each in self.prepared.phases},
            train=str(splits["train"].index.folder.resolve()),
            evaluated={phase.name: str(splits["eval"].index.folder.resolve())} if "eval" in splits else {},
            start=self._start(start),
            deepspeed=self.files[phase.name],
            resume=str(begin.folder) if begin else None,
            begin=self._step_of(begin),
            stop_after=None if today is None else today - steps_before,
            wandb_id=self.ledger.wandb_id() if wandb else None,
            smoke=self.wanted.smoke,
        )

    def _start(self, weights: Weights) -> Start:
        """The folders of what a phase starts from."""
        base = str(self.root / weights.folder) if weights.folder else self.base.folder
        shape = None if weights.folder else self.base.shape
        adapter = weights.adapters[-1].folder if weights.adapters else None
        place = self.base.adapter if adapter == "" else adapter and str(self.root / adapter)
        return Start(base, shape, place, weights.digest, weights.base, None if weights.folder else self.base.commit)


# What is wanted -------------------------------------------------------------------------------------------------------


def _require_phases(plan: Plan, wanted: Wanted) -> None:
    names = [phase.name for phase in plan.phases]
    for option, name in (("--from", wanted.first), ("--until", wanted.last)):
        if name is not None and name not in names:
            raise InputError(
                f"{option}: no phase is called {name!r}{nearest(name, names)} (phases: {', '.join(names)})"
            )
    if wanted.first and wanted.last and names.index(wanted.first) > names.index(wanted.last):
        raise InputError(f"--from {wanted.first} comes after --until {wanted.last}; nothing lies between them")
    if merged := [phase.name for phase in plan.phases[:-1] if phase.phase.handover == "merge"]:
        raise InputError(f"phases.{merged[0]}.handover: this version does not merge between phases yet; take it out")


def _require_goes_on(run_dir: RunDir, plan: Plan, wanted: Wanted) -> str | None:
    """What the ledger will refuse anyway is refused before the data is made. Returns the phase that is under way."""
    record = read_record(run_dir)
    if record is not None:
        record = reconcile(record, plan, wanted.redo_from, next_archive(run_dir))
    elif wanted.redo_from is not None:
        raise InputError("--redo-from: no run has begun yet that could be redone; leave it out")
    done = {phase.name for phase in record.phases if phase.state == "done"} if record else set()
    for phase in plan.phases[: _index(plan, wanted.first, 0)]:
        if phase.name not in done:
            raise InputError(f"--from {wanted.first}: phase {phase.name} before it is not done yet; leave --from out")
    half_done = next((phase.name for phase in record.phases if phase.state == "running"), None) if record else None
    if wanted.resume not in (None, "none") and half_done is None:
        raise InputError(f"--resume {wanted.resume}: no phase is under way in {run_dir.root}; leave it out")
    return half_done


def _require_writable(run_dir: RunDir) -> None:
    """Before hours of preparation, and not after."""
    place = next(path for path in (run_dir.root.resolve(), *run_dir.root.resolve().parents) if path.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{run_dir.root}: {place} cannot be written to; name another folder (run.output_dir, run.dir)")


def _index(plan: Plan, name: str | None, otherwise: int) -> int:
    return plan.phase(name).number - 1 if name else otherwise


def _counted(plan: Plan, ranks: int, prepared: PreparedRun | None = None) -> Plan:
    """The same plan, now that ranks, and perhaps rows, can be counted."""
    epochs = {phase.plan.name: phase.epoch for phase in prepared.phases} if prepared else {}
    return make_plan(Loaded(plan.config, plan.places), ranks, epochs)


def smoke_run_dir(plan: Plan) -> RunDir:
    """A folder to try in, emptied: beside the runs, so that the same disk is tried."""
    run_dir = RunDir(Path(plan.config.run.output_dir).expanduser() / f"{plan.name}-smoke")
    shutil.rmtree(run_dir.root, ignore_errors=True)
    return run_dir


# What phases are launched with ----------------------------------------------------------------------------------------


def _keep_tokenizer(run_dir: RunDir, tokenizer: Tokenizer) -> None:
    """As every published folder holds it: what the phases are trained with, whatever becomes of where it was."""
    folder = run_dir.root / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.files().items():
        publish_file(folder / name, content)


def _keep_final(run: Run) -> None:
    """The last weights once more under the run's own name, without a second copy of their bytes."""
    final, last = run.root / "final_model", run.plan.phases[-1]
    found = read_source(run.root / last.folder)
    if found is None or _same(final / MARKER, found[0] / MARKER):
        return
    beside = final.with_name(".final_model.building")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(found[0], beside, copy_function=copied)
    sources = [read_source(run.root / phase.folder) for phase in run.plan.phases]
    model = run.plan.config.model
    info = {
        "run": run.plan.name,
        "base": {"name": model.name, "commit": run.base.commit, "digest": run.base.digest},
        "phases": [asdict(source[1]) for source in sources if source],
        "versions": versions(),
    }
    publish_file(beside / "training_info.json", (json.dumps(info, indent=2) + "\n").encode())
    shutil.rmtree(final, ignore_errors=True)  # of a run that had fewer phases
    os.replace(beside, final)


def _merge_last(run: Run) -> None:
    """The plain model, once all phases are done: there already, or made now."""
    run.stop.require_on()
    last = run.ledger.record.phases[-1]
    job = job_of_run(run.plan, run.root, run.base, last)
    merged = merge(job)
    if merged.now:
        run.tell(f"merged: {merged.folder}")


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.read_bytes() == other.read_bytes()
