"""Processes are started, watched and ended: all of them, or none is left.

started ─ all ended well ──────────────────────────────→ done
        ─ one has failed ─ the others are ended ───────→ the first failure is told
        ─ a stop is asked ─ they leave, with a checkpoint ─→ passed on
        ─ no sign of any of them ─ all are killed ─────→ told, with what each was at
        ─ killed here ─ every rank sees it, and ends
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from phased_cpt.launchers.commands import WORKER, Command
from phased_cpt.launchers.failures import failure_of
from phased_cpt.launchers.parents import CONDUCTOR
from phased_cpt.launchers.processes import environment_of, everyone, tell, words_of
from phased_cpt.launchers.supervision import POLL_SECONDS, Hung, Supervision, signal_session
from phased_cpt.stopping import Stopping

GRACE_SECONDS = 5.0  # between asking a process to end and ending it
EARLY_SECONDS = 1.0  # the same where none of them has begun to train


def launched(commands: Sequence[Command], logs: Path, stop: Stopping, hang_seconds: float) -> None:
    """Run the processes of a job to their end."""
    stop.require_on()
    _forget_earlier(logs)
    processes: list[subprocess.Popen[bytes]] = []
    with stop.held():
        try:
            for command in commands:
                processes.append(_started(command))
            job = Supervision(processes, logs, stop, hang_seconds, _mark())
            failed = job.failed(GRACE_SECONDS)
        except BaseException as error:
            _end(processes, 0.0 if isinstance(error, Hung) else GRACE_SECONDS)
            raise
        if failed is not None:
            code = processes[failed].returncode
            _end(processes, EARLY_SECONDS if job.ended_early else GRACE_SECONDS)
            raise failure_of(commands[failed].name, code, logs, commands[failed].log, job.stopped_by(code))


def _forget_earlier(logs: Path) -> None:
    """The words and pulses of an earlier attempt: its process ids may be anybody's by now."""
    logs.mkdir(parents=True, exist_ok=True)
    for left in (*logs.glob("failed-*.json"), *logs.glob("pulse-*.json")):
        left.unlink()


def _mark() -> dict[str, str]:
    """By which every process of this job is known, whoever has started it."""
    return {CONDUCTOR: str(os.getpid())}


def _started(command: Command) -> subprocess.Popen[bytes]:
    """In a session of its own: a Ctrl-C reaches the conductor alone, who ends them in order."""
    environment = {**os.environ, **command.environment, **_mark()}
    output = command.log.open("wb") if command.log else None
    try:
        return subprocess.Popen(  # noqa: S603
            command.words, env=environment, stdout=output, stderr=output and subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    finally:
        if output:
            output.close()


def _end(processes: Sequence[subprocess.Popen[bytes]], grace_seconds: float) -> None:
    """Whoever still runs is asked to end, and then made to; a launcher's ranks are in its session, and end with it."""
    left = [process for process in processes if process.poll() is None]
    for process in processes:  # of a launcher that was killed, the ranks are still there
        signal_session(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while left and time.monotonic() < deadline:
        left = [process for process in left if process.poll() is None]
        time.sleep(POLL_SECONDS)
    for process in processes:
        signal_session(process, signal.SIGKILL)
    for rank in _ranks():  # torchrun gives each of them a session of its own
        tell(rank, signal.SIGKILL)
    for process in left:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one in the hands of a broken disk or GPU
            process.wait(GRACE_SECONDS)


def _ranks() -> list[int]:
    """Those of this job that are still there, and launchers between them and here."""
    name, me = next(iter(_mark().items()))
    ours = (each for each in everyone() if environment_of(each).get(name) == me)
    return [each for each in ours if any(WORKER in word for word in words_of(each))]
