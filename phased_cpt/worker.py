"""The story of a phase, as each rank lives it.

python -m phased_cpt.worker <phase folder>/job.json         as a rank, by whatever launcher
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from phased_cpt.config.secrets import scrubbed
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.job import Job
from phased_cpt.launchers import CONDUCTOR
from phased_cpt.launchers.hang import Watchdog
from phased_cpt.launchers.parents import die_with_the_parent
from phased_cpt.ledger import rank_lock
from phased_cpt.model.base import make_random_base, this_device
from phased_cpt.model.quiet import quiet
from phased_cpt.plan import PhasePlan
from phased_cpt.pulse import CLOSING, Beating
from phased_cpt.run_dir import disk_failed, publish_file
from phased_cpt.stopping import heard
from phased_cpt.tracking import Stretch, WandbSettings, open_sinks
from phased_cpt.train.engine import Rank, device_memory, join, meet, swept
from phased_cpt.train.phase_run import PhaseRun
from phased_cpt.train.shortage import memory_is_told, rows_of
from phased_cpt.train.watch import Listener, Nobody


def train_phase(job: Job, rank: Rank) -> None:
    """One phase: from its start, or from where it was stopped, to what it publishes."""
    phase = job.phase_plan()
    with contextlib.ExitStack() as around:
        stop = around.enter_context(heard())
        to_the_end = around.enter_context(contextlib.ExitStack())  # first, so that what is held outlives the sinks
        around.enter_context(swept())
        around.enter_context(rank_lock(job.run, job.signature))
        pulse = around.enter_context(beating(job, rank))
        if CONDUCTOR not in os.environ:  # which would look at the pulses
            patience = job.plan().config.launch.hang_minutes * 60
            around.enter_context(Watchdog(job.run.root / phase.folder / "logs", rank.number, patience))
        listener = around.enter_context(listening(job, phase, rank))
        around.callback(pulse.beat, CLOSING)
        around.enter_context(failing_says_where(phase, pulse))  # last, before anything else is closed
        stop.require_on()
        _require_seen(job)
        # Before the arguments of a phase: with ZeRO-3 on, one rank could not alone.
        _make_base(job, phase, rank, listener)
        run = PhaseRun(job, phase, rank, listener, stop, pulse, to_the_end)
        with memory_is_told(job, phase, run.device, lambda: pulse.where):
            run.load()
            run.train()
            run.measure()
        run.publish()
        run.tear_down()


@contextlib.contextmanager
def beating(job: Job, rank: Rank) -> Iterator[Beating]:
    """Signs of life, and stacks for whoever asks because there are none."""
    logs = job.run.root / job.phase_plan().folder / "logs"
    pulse = Beating(logs, rank.number)
    with (logs / f"stacks-{rank.number}.txt").open("w") as stacks:
        faulthandler.register(signal.SIGUSR2, stacks)
        try:
            yield pulse
        finally:
            faulthandler.unregister(signal.SIGUSR2)
            pulse.close()
    with contextlib.suppress(OSError):
        if not (path := Path(stacks.name)).stat().st_size:
            path.unlink()


@contextlib.contextmanager
def failing_says_where(phase: PhasePlan, pulse: Beating) -> Iterator[None]:
    """What was being done, on what, for whoever reads a traceback that nobody foresaw."""
    try:
        yield
    except Exception as error:
        error.add_note(f"(in phase {phase.name}, {pulse.where})")
        with contextlib.suppress(RuntimeError):  # of a GPU that answers no more
            error.add_note(f"({rows_of(phase)}, {device_memory(this_device())})")
        raise


def _require_seen(job: Job) -> None:
    """What the conductor has found is here, too: on several machines each has a disk of its own."""
    base = [job.start.base] if job.start.shape is None else []
    adapter = [job.start.adapter] if job.start.adapter else []
    measured = [folder for folder, _ in job.measure.sets.values()]
    for place in (job.train, *job.evaluated.values(), *measured, *base, *adapter, *job.start.below):
        if not Path(place).exists():
            where = f"{place} is not seen on {socket.gethostname()}"
            raise InputError(
                f"{where}; run.cache_dir and the model must lie where all nodes see them, under the same path"
            )


def _make_base(job: Job, phase: PhasePlan, rank: Rank, listener: Listener) -> None:
    """Random weights, where nobody has made them yet: minutes, of a large model."""
    if job.start.shape is not None:
        if rank.first:
            if not Path(job.start.base).exists():
                listener.tell(f"{phase.name}: making random weights in {job.start.base}")
            make_random_base(Path(job.start.base), job.start.shape, phase.seed)
        meet(rank)


@contextlib.contextmanager
def listening(job: Job, phase: PhasePlan, rank: Rank) -> Iterator[Listener]:
    """The sinks, on the first rank."""
    if not rank.first:
        yield Nobody()
        return
    tracking, before = phase_tracking(job), job.plan().phases[: phase.number - 1]
    stretch = Stretch(
        root=job.run.root,
        run=job.plan().name,
        folder=phase.folder,
        phase=phase.name,
        number=phase.number,
        of=len(job.plan().phases),
        steps=phase.steps or 0,
        steps_before=sum(each.steps or 0 for each in before),
        begin=job.begin,
        attempt=job.attempt,
        **tracking,
    )
    with open_sinks(stretch) as sinks:
        yield sinks


def phase_tracking(job: Job) -> dict[str, Any]:
    """Which sinks are on."""
    tracking = job.plan().config.tracking
    wandb = tracking.wandb
    on = wandb.enabled and job.wandb_id is not None
    settings = WandbSettings(wandb.project, wandb.entity, wandb.mode, job.wandb_id or "") if on else None
    return {"tensorboard": tracking.tensorboard.enabled, "wandb": settings}


# As a process of its own ----------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> NoReturn:
    """A rank of a job: train, and leave by the shortest way."""
    die_with_the_parent()
    quiet()
    job = Job.read(Path(arguments[0]))
    try:
        train_phase(job, join())
        code = 0
    except PhasedCptError as error:
        code = fail(job, str(error), error.exit_code)
    except OSError as error:
        traceback.print_exc()
        told = disk_failed(error, job.run.root, "what is sealed and published is whole")
        code = fail(job, str(told), told.exit_code)
    except BaseException as error:
        traceback.print_exc()
        where = getattr(error, "__notes__", [])
        code = fail(job, " ".join([f"{type(error).__name__}: {error}", *where]), 1, unexpected=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what is left to do is to wait for the libraries: three seconds


def fail(job: Job, message: str, code: int, *, unexpected: bool = False) -> int:
    """Leave word for the conductor, who tells the user once, whichever ranks have failed."""
    path = job.run.root / job.phase_plan().folder / "logs" / f"failed-{os.environ['RANK']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    word = {"exit_code": code, "message": scrubbed(message), "rank": int(os.environ["RANK"]), "unexpected": unexpected}
    try:
        publish_file(path, json.dumps(word).encode())
    except OSError:  # the disk is full to the last byte, it may be
        sys.stderr.write(f"{word['message']}\n")
    return code


if __name__ == "__main__":
    main(sys.argv[1:])
