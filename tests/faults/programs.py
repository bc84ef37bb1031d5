"""In the ranks: the worker, and what befalls it."""

import hashlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from tests.faults.operations import act_at, without_fsync


def works(arguments: list[str]) -> None:
    """The control: nothing befalls it."""
    from phased_cpt import worker

    without_fsync()
    worker.main(arguments)


def meets(phase: int, rank: int, at: int, how: dict[str, Any], word: str, arguments: list[str]) -> None:
    """One rank of one phase is killed, or finds the disk full, at its n-th operation."""
    path = Path(arguments[0])
    if int(os.environ["RANK"]) == rank and path.parent.name.startswith(f"phase{phase}_"):
        act_at(at, path.parents[1], Path(word), **how)
    works(arguments)


def dies_later(seconds: float, consumed: str, arguments: list[str]) -> None:
    """All ranks are killed after a while; until then each writes down which rows it computes, in which step."""
    from phased_cpt import worker

    losses = worker.PhaseRun._losses
    rank = os.environ["RANK"]
    log = os.open(f"{consumed}-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def seen(run: worker.PhaseRun, batch: dict[str, Any]) -> Any:
        if "place" in batch and run.model.training:
            rows = hashlib.sha256(batch["input_ids"].cpu().numpy().tobytes()).hexdigest()
            step = run.trainer.state.global_step + 1
            line = [run.phase.name, step, int(batch["place"][0]), rows]
            os.write(log, json.dumps(line).encode() + b"\n")
        return losses(run, batch)

    worker.PhaseRun._losses = seen  # type: ignore[method-assign]
    if seconds > 0:
        ends = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        ends.daemon = True
        ends.start()
    works(arguments)


# Wrong ways to go on: criterion E must see each of them ------------------------------------------------------------------


def goes_on_wrongly(how: str, arguments: list[str]) -> None:
    """The negative controls."""
    from phased_cpt.train import checkpoint, moments, phase_run, trainer

    def a_row_later(blocks: Any, order: Any, begin: int = 0) -> trainer.TrainedRows:
        return trainer.TrainedRows(blocks, order, begin + 1 if begin else 0)

    set_moment = moments.set_moment

    def without_exp_avg(weight: Any, key: str, moment: Any) -> None:
        set_moment(weight, key, moment * 0 if key == "exp_avg" else moment)

    if how == "a row later":
        phase_run.TrainedRows = a_row_later  # type: ignore[assignment,misc]
    elif how == "dropout is not seeded":
        trainer.PhaseTrainer._seed = lambda self, place: None  # type: ignore[method-assign]
    elif how == "exp_avg is not restored":
        moments.set_moment = without_exp_avg
        checkpoint.require_restored = lambda *given: 0  # which sees it by itself: see below
    elif how == "exp_avg is not restored, and looked at":
        moments.set_moment = without_exp_avg
    elif how == "the learning rate begins anew":
        checkpoint._set_schedule = lambda *given: None
    works(arguments)


# What fails again and again ----------------------------------------------------------------------------------------------


def fails_at(step: int, arguments: list[str]) -> None:
    """A step of the second phase that never succeeds."""
    from phased_cpt import worker

    check = worker.PhaseRun._check

    def failing(run: worker.PhaseRun, now: int) -> None:
        check(run, now)
        if run.phase.number == 2 and now == step and run.rank.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    worker.PhaseRun._check = failing  # type: ignore[method-assign]
    works(arguments)


def fails_after_each_save(arguments: list[str]) -> None:
    """Each attempt makes one new checkpoint, and is killed."""
    from phased_cpt import worker

    save = worker.PhaseRun._save

    def failing(run: worker.PhaseRun) -> None:
        save(run)
        if run.rank.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    worker.PhaseRun._save = failing  # type: ignore[method-assign]
    works(arguments)


def no_number(arguments: list[str]) -> None:
    """A loss that is none."""
    from phased_cpt import worker

    losses = worker.PhaseRun._losses
    worker.PhaseRun._losses = lambda run, batch: losses(run, batch) * float("nan")  # type: ignore[method-assign]
    works(arguments)


# A disk -----------------------------------------------------------------------------------------------------------------


def fills(disk: str, step: int, passage: str, arguments: list[str]) -> None:
    """Somebody else fills the disk, just before something is written."""
    from phased_cpt import worker

    before = getattr(worker.PhaseRun, passage)

    def full(run: worker.PhaseRun, *given: Any) -> Any:
        if run.rank.first and run.phase.number == 2 and run.trainer.state.global_step == step:
            filler = os.open(f"{disk}/filler", os.O_WRONLY | os.O_CREAT, 0o666)
            free = os.statvfs(disk)
            os.posix_fallocate(filler, 0, free.f_bavail * free.f_frsize)
            os.close(filler)
        return before(run, *given)

    setattr(worker.PhaseRun, passage, full)
    works(arguments)
