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
    from phased_cpt.worker import main

    without_fsync()
    main(arguments)


def meets(phase: int, rank: int, at: int, how: dict[str, Any], word: str, arguments: list[str]) -> None:
    """One rank of one phase is killed, or finds the disk full, at its n-th operation."""
    path = Path(arguments[0])
    if int(os.environ["RANK"]) == rank and path.parent.name.startswith(f"phase{phase}_"):
        act_at(at, path.parents[1], Path(word), **how)
    works(arguments)


def dies_later(batches: int, seconds: float, consumed: str, arguments: list[str]) -> None:
    """All ranks are killed a moment after so many micro batches; each writes down which rows it computes, and when."""
    from phased_cpt.train.phase_run import PhaseRun

    losses, rank, left = PhaseRun._losses, os.environ["RANK"], [batches]
    log = os.open(f"{consumed}-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def seen(run: PhaseRun, batch: dict[str, Any]) -> Any:
        if "place" in batch and run.model.training:
            rows = hashlib.sha256(batch["input_ids"].cpu().numpy().tobytes()).hexdigest()
            step = run.trainer.state.global_step + 1
            line = [run.phase.name, step, int(batch["place"][0]), rows]
            os.write(log, json.dumps(line).encode() + b"\n")
            left[0] -= 1
            if left[0] == 0:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return losses(run, batch)

    PhaseRun._losses = seen  # type: ignore[assignment,method-assign]
    works(arguments)


# Wrong ways to go on: criterion E must see each of them ------------------------------------------------------------------


def goes_on_wrongly(how: str, arguments: list[str]) -> None:
    """The negative controls."""
    from phased_cpt.train import checkpoint, moments, phase_run, trainer

    def a_row_later(blocks: Any, order: Any, begin: int = 0) -> trainer.TrainedRows:
        return trainer.TrainedRows(blocks, order, begin + 1 if begin else 0)

    set_moment: Any = moments.set_moment

    def without_exp_avg(*given: Any) -> None:
        *where, moment = given
        set_moment(*where, moment * 0 if "exp_avg" in where else moment)

    if how == "a row later":
        phase_run.TrainedRows = a_row_later  # type: ignore[assignment,attr-defined]
    elif how == "dropout is not seeded":
        trainer.PhaseTrainer._seed = lambda self, place: None  # type: ignore[method-assign]
    elif how == "exp_avg is not restored":
        moments.set_moment = without_exp_avg  # type: ignore[assignment]
        checkpoint.require_restored = lambda *given: 0  # which sees it by itself: see below
    elif how == "exp_avg is not restored, and looked at":
        moments.set_moment = without_exp_avg  # type: ignore[assignment]
    elif how == "the learning rate begins anew":
        checkpoint._set_schedule = lambda *given: None
    works(arguments)


# What fails again and again ----------------------------------------------------------------------------------------------


def fails_at(step: int, arguments: list[str]) -> None:
    """A step of the second phase that never succeeds."""
    from phased_cpt.train.phase_run import PhaseRun

    check = PhaseRun._check

    def failing(run: PhaseRun, now: int) -> None:
        check(run, now)
        if run.phase.number == 2 and now == step and run.rank.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    PhaseRun._check = failing  # type: ignore[assignment,method-assign]
    works(arguments)


def fails_after_each_save(arguments: list[str]) -> None:
    """Each attempt makes one new checkpoint, and is killed."""
    from phased_cpt.train.phase_run import PhaseRun

    save = PhaseRun._save

    def failing(run: PhaseRun) -> None:
        save(run)
        if run.rank.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    PhaseRun._save = failing  # type: ignore[assignment,method-assign]
    works(arguments)


def no_number(arguments: list[str]) -> None:
    """A loss that is none."""
    from phased_cpt.train.phase_run import PhaseRun

    losses = PhaseRun._losses
    PhaseRun._losses = lambda run, batch: losses(run, batch) * float("nan")  # type: ignore[assignment,method-assign]
    works(arguments)


# A disk -----------------------------------------------------------------------------------------------------------------


def fills(disk: str, step: int, passage: str, arguments: list[str]) -> None:
    """Somebody else fills the disk, just before something is written."""
    from phased_cpt.train.phase_run import PhaseRun

    before = getattr(PhaseRun, passage)

    def full(run: PhaseRun, *given: Any) -> Any:
        if run.rank.first and run.phase.number == 2 and run.trainer.state.global_step == step:
            filler = os.open(f"{disk}/filler", os.O_WRONLY | os.O_CREAT, 0o666)
            free = os.statvfs(disk)
            os.posix_fallocate(filler, 0, free.f_bavail * free.f_frsize)
            os.close(filler)
        return before(run, *given)

    setattr(PhaseRun, passage, full)
    works(arguments)
