"""The equal-token control of a phase: what it would have forgotten anyway.

start of the phase ─┬─ its documents ─────────────── what it is           forgetting = loss of the phase on earlier sets
                    └─ earlier ones, as many steps ─ its control                       - loss of its control on them

Against the weights that a phase began with, forgetting is told too small: on the old documents these would have gone on
learning. How much that is, see the section Science of benchmarks/README.md: little, where they were learnt to the end.
"""

import shutil
from dataclasses import replace

from phased_cpt.conducting import Run
from phased_cpt.data.prepare import prepare
from phased_cpt.data.watch import Watcher
from phased_cpt.errors import PhasedCptError
from phased_cpt.handover import require_base
from phased_cpt.job import Job
from phased_cpt.kept import keep_tokenizer
from phased_cpt.ledger import Weights, require_no_ranks, run_lock
from phased_cpt.matrix import CONTROL, control_of
from phased_cpt.plan import PhasePlan
from phased_cpt.published import read_source, require_published
from phased_cpt.run_dir import CHECKPOINTS, RunDir
from phased_cpt.sealed import clear_after, newest


def controls(run: Run, phases: tuple[PhasePlan, ...], watcher: Watcher) -> None:
    """Of every one of these phases that is done and has something before it; those that are there stay."""
    for phase in phases:
        record, found = run.ledger.record.phase(phase.name), read_source(run.root / phase.folder)
        if phase.number > 1 and found and not found[1].row:
            what = "it was not measured after its end, so nothing could be held against a control"
            run.tell(f"no control of {phase.name}: {what} (evaluation.matrix: every_phase)")
        elif phase.number > 1 and found and record.published and control_of(run.root, record) is None:
            if found[1].steps < (phase.steps or 0):
                run.tell(f"{phase.name} stopped after {found[1].steps} steps, and its control takes {phase.steps}")
            assert record.started_from is not None
            _control(run, phase, record.started_from, watcher)
            shutil.rmtree(run.root / CONTROL / phase.folder / CHECKPOINTS, ignore_errors=True)
            run.report()


def _control(run: Run, phase: PhasePlan, start: Weights, watcher: Watcher) -> None:
    run.stop.require_on()
    old = replace(run, prepared=prepare(run.plan, watcher, control=phase.name))
    require_base(run.plan, run.root, run.base, start, run.ledger.record.phases)
    require_published(run.root, start)
    run_dir = RunDir(run.root / CONTROL)
    run_dir.root.mkdir(exist_ok=True)
    keep_tokenizer(run_dir.root, old.prepared.tokenizer)
    with run_lock(run_dir) as signature:
        require_no_ranks(run_dir)
        job = _job(old, phase, start, run_dir, signature)
        run.tell(
            f"control of {phase.name}: {job.phase_plan().steps} steps on the phases before it, from the same start"
        )
        job.write()
        run.door.train(job, run.stop)
    if control_of(run.root, run.ledger.record.phase(phase.name)) is None:
        raise PhasedCptError(f"the control of {phase.name} has ended without a result; see {job.path.parent}/logs")


def _job(old: Run, phase: PhasePlan, start: Weights, run_dir: RunDir, signature: str) -> Job:
    """That of the phase, but for what it reads, what it is judged by, and where it writes."""
    fingerprint = f"{old.ledger.fingerprint(phase)}-{CONTROL}"
    folder = run_dir.root / phase.folder / CHECKPOINTS
    begin = newest(folder, fingerprint, old.tell)
    clear_after(folder, begin.manifest.step if begin else 0)
    job = old.job(phase, start, fingerprint, begin, 0)
    config = job.config | {
        "phases": [{**each, "gate": None} for each in job.config["phases"][: phase.number]],  # nothing comes after it
        "tracking": {"tensorboard": {"enabled": False}},
    }
    measure = replace(job.measure, after=True, before=False, prompts=0)
    return replace(
        job,
        run_dir=str(run_dir.root),
        signature=signature,
        config=config,
        evaluated={},
        measure=measure,
        wandb_id=None,
        stop_after=None,
    )
