"""The story of a run: prepare, then phase after phase, each from what the one before has published.

Both doors come through here. `phased-cpt run` brings a launcher, which starts a job of fresh processes for a phase;
`deepspeed --module phased_cpt` brings the ranks that it is one of. Either way a phase is done when what it published
is there and is what it says, whatever any process returned.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from phased_cpt.bases import find_base
from phased_cpt.blend import require_there
from phased_cpt.conducting import Run, TriedAgain
from phased_cpt.config import Loaded, RunConfig, from_objects, load
from phased_cpt.config.allowed import nearest
from phased_cpt.control import controls
from phased_cpt.data.prepare import cache_folder, prepare
from phased_cpt.data.prepared import PreparedRun
from phased_cpt.data.watch import Unwatched, Watcher
from phased_cpt.doors import Door, LaunchedJobs
from phased_cpt.errors import InputError
from phased_cpt.fitting import filled_file
from phased_cpt.job import SMOKE_STEPS
from phased_cpt.kept import keep_final, keep_tokenizer
from phased_cpt.ledger import Ledger, amended, choose_run_dir, next_archive, read_record, reconcile, run_lock
from phased_cpt.merging import job_of_run, merge
from phased_cpt.plan import Plan, Wanted, make_plan
from phased_cpt.run_dir import RunDir
from phased_cpt.stopping import Stopping, heard

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
        while True:
            try:
                return _conduct(plan, run_dir, door, wanted, watcher, look, stop)
            except TriedAgain:
                wanted = replace(wanted, redo_from=None, resume=None)


def _conduct(
    plan: Plan, run_dir: RunDir, door: Door, wanted: Wanted, watcher: Watcher, look: Look, stop: Stopping
) -> Outcome:
    _require_phases(plan, wanted)
    plan = amended(plan, read_record(run_dir), wanted.redo_from)
    half_done = _require_goes_on(run_dir, _counted(plan, door.ranks), wanted)
    _require_writable(run_dir)
    base = find_base(plan, run_dir.root.resolve(), cache_folder(plan), afresh=half_done is not None)
    files = {phase.name: filled_file(phase, base) for phase in _counted(plan, door.ranks).phases}
    prepared = prepare(_counted(plan, door.ranks), watcher)  # hours, it may be; what is wrong above is told before
    base.require_ids(prepared.tokenizer.vocabulary, prepared.tokenizer.name)
    plan = _counted(plan, door.ranks, prepared)
    plan = plan.smoke(SMOKE_STEPS) if wanted.smoke else plan
    look(prepared, plan)
    with run_lock(run_dir) as signature:
        ledger = Ledger.open(run_dir, plan, redo_from=wanted.redo_from)
        if done := [phase.name for phase in ledger.record.phases if phase.state == "done"]:
            watcher.tell(f"going on in {run_dir.root}: {', '.join(done)} done already")
        run = Run(plan, prepared, base, files, ledger, signature, door, wanted, half_done, stop, watcher.tell)
        keep_tokenizer(run.root, prepared.tokenizer)
        trained, steps = [], 0
        for phase in plan.phases[: _index(plan, wanted.last, len(plan.phases)) + 1]:
            inputs = run.inputs(phase, run.start_of(phase))
            if not ledger.is_done(phase, inputs):
                steps += run.phase(phase, inputs, steps)
                trained.append(phase.name)
                run.report()
            run.clear(phase)
        run.report(anew=False)  # of a call that was killed before it
        if ledger.is_finished:
            keep_final(run.root, plan, base)
            if plan.config.merge.enabled and not wanted.smoke:
                _merge_last(run)
        if wanted.control:
            first, last = _index(plan, wanted.first, 0), _index(plan, wanted.last, len(plan.phases) - 1)
            controls(run, plan.phases[first : last + 1], watcher)
    return Outcome(run_dir, plan, tuple(trained), ledger.is_finished)


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


def _merge_last(run: Run) -> None:
    """The plain model, once all phases are done: there already, or made now."""
    run.stop.require_on()
    last = run.ledger.record.phases[-1]
    assert last.published is not None  # the run is finished
    require_there(run.plan, run.root, run.base, last.published, run.ledger.record.phases, run.tell)
    job = job_of_run(run.plan, run.root, run.base, last)
    merged = merge(job)
    if merged.now:
        run.tell(f"merged: {merged.folder}")
        run.report()
