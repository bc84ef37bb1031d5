"""Processes are started, watched and ended: all of them, or none is left.

started ─ all ended well ──────────────────────────────→ done
        ─ one has failed ─ the others are ended ───────→ the first failure is told
        ─ a stop is asked ─ they leave, with a checkpoint ─→ passed on
        ─ no sign of any of them ─ all are killed ─────→ told, with what each was at
        ─ killed here ─ every rank sees it, and ends
"""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from phased_cpt.launchers.commands import Command, Environment
from phased_cpt.launchers.failures import was_killed
from phased_cpt.launchers.parents import CONDUCTOR
from phased_cpt.launchers.processes import environment_of, everyone, tell
from phased_cpt.launchers.running import OwnProcess, Part, Running
from phased_cpt.launchers.supervision import POLL_SECONDS, Hung, Supervision
from phased_cpt.stopping import Stopping

GRACE_SECONDS = 5.0  # between asking a process to end and ending it
EARLY_SECONDS = 1.0  # the same where none of them has begun to train


def launched(
    commands: Sequence[Command], logs: Path, stop: Stopping, hang_seconds: float, elsewhere: Sequence[Part] = ()
) -> None:
    """Run the processes of a job to their end, here and `elsewhere`: on other nodes."""
    stop.require_on()
    forget_earlier(logs)
    with stop.held():
        attended(commands, logs, stop, hang_seconds, elsewhere)


def attended(
    commands: Sequence[Command], logs: Path, stop: Stopping, hang_seconds: float, elsewhere: Sequence[Part] = ()
) -> None:
    """The same, where `logs` are also those of others, and a stop is held off already."""
    running: list[Running] = []
    try:
        for command in commands:
            running.append(OwnProcess(command, _mark()))
        running += [part.start(_mark()) for part in elsewhere]
        job = Supervision(running, logs, stop, hang_seconds, _mark())
        failed = job.failed(GRACE_SECONDS)
    except BaseException as error:
        _end(running, 0.0 if isinstance(error, Hung) else GRACE_SECONDS)
        raise
    if failed is not None:
        code = running[failed].poll()
        _end(running, EARLY_SECONDS if job.ended_early else GRACE_SECONDS)
        if code == 1:  # perhaps because a rank was killed elsewhere, whose neighbours were slow to end
            killed = (at for at, one in enumerate(running) if one.is_elsewhere and was_killed(one.poll()))
            failed = next(killed, failed)
        failure = running[failed].failure(logs, job.stopped_by(code))
        failure.ended = code
        raise failure


def forget_earlier(logs: Path) -> None:
    """The words and pulses of an earlier attempt: its process ids may be anybody's by now."""
    logs.mkdir(parents=True, exist_ok=True)
    for left in (*logs.glob("failed-*.json"), *logs.glob("pulse-*.json")):
        left.unlink()


def _mark() -> Environment:
    """By which every process of this job is known, whoever has started it."""
    return {CONDUCTOR: str(os.getpid())}


def _end(running: Sequence[Running], grace_seconds: float) -> None:
    """Whoever still runs is asked to end, and then made to; a launcher's ranks are in its session, and end with it."""
    left = [one for one in running if one.poll() is None]
    for one in running:  # of a launcher that was killed, the ranks are still there
        one.end(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while left and time.monotonic() < deadline:
        left = [one for one in left if one.poll() is None]
        time.sleep(POLL_SECONDS)
    for one in running:
        one.end(signal.SIGKILL)
    for rank in _ranks():  # torchrun gives each of them a session of its own
        tell(rank, signal.SIGKILL)
    for one in left:
        one.wait(GRACE_SECONDS)


def _ranks() -> list[int]:
    """Those of this job that are still there, and launchers between them and here."""
    name, me = next(iter(_mark().items()))
    ours = (each for each in everyone() if environment_of(each).get(name) == me)
    return [each for each in ours if each != os.getpid()]
