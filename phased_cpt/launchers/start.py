"""Processes are started, watched and ended: all of them, or none is left.

started ─ all ended well ──────────────────────────────→ done
        ─ one has failed ─ the others are ended ───────→ the first failure is told
        ─ Ctrl-C or SIGTERM here ─ all of them are ended ─→ passed on
        ─ killed here ─ every rank sees it, and ends
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from phased_cpt.errors import PhasedCptError
from phased_cpt.launchers.commands import Command

CONDUCTOR = "PHASED_CPT_CONDUCTOR"  # in the environment of every rank, however deep below: whose end is its end
POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0  # between asking a process to end and ending it
LAST_LINES = 15


def launched(commands: Sequence[Command], logs: Path) -> None:
    """Run the processes of a job to their end."""
    logs.mkdir(parents=True, exist_ok=True)
    for left in logs.glob("failed-*.json"):
        left.unlink()
    processes: list[subprocess.Popen[bytes]] = []
    with _sigterm_is_raised():
        try:
            for command in commands:
                processes.append(_started(command))
            failed = _watched(processes)
        except BaseException:
            _end(processes)
            raise
        if failed is not None:
            code = processes[failed].returncode
            _end(processes)
            raise failure_of(commands[failed].name, code, logs, commands[failed].log)


def _watched(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all of them to end well, or for the first that does not."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            # One that was killed drags the others along within a moment: it is the one to be told of.
            return next(
                (at for at, code in enumerate(codes) if _killed(code)),
                next(filter(codes.__getitem__, range(len(codes)))),
            )
        if None not in codes:
            return None
        time.sleep(POLL_SECONDS)


def _killed(code: int | None) -> bool:
    """From outside, or by what it did to memory; an abort is how libraries end themselves."""
    return _signal_of(code) not in (None, signal.SIGABRT)


def _signal_of(code: int | None) -> signal.Signals | None:
    """What ended it; a launcher says of a rank that was killed what a shell or C would: 137, or 247."""
    if code is None or 0 <= code <= 128 or code == 255:
        return None
    known = set(signal.Signals)
    return next((signal.Signals(number) for number in (-code, code - 128, 256 - code) if number in known), None)


def _started(command: Command) -> subprocess.Popen[bytes]:
    """In a session of its own: a Ctrl-C reaches the conductor alone, who ends them in order."""
    environment = {**os.environ, **command.environment, CONDUCTOR: str(os.getpid())}
    output = command.log.open("wb") if command.log else None
    try:
        return subprocess.Popen(  # noqa: S603
            command.words, env=environment, stdout=output, stderr=output and subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    finally:
        if output:
            output.close()


@contextlib.contextmanager
def _sigterm_is_raised() -> Iterator[None]:
    """As a Ctrl-C is, so that the ranks are ended first; the exit code is what shells say of a program ended so."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Whoever still runs is asked to end, and then made to; a launcher's ranks are in its session, and end with it."""
    left = [process for process in processes if process.poll() is None]
    for process in processes:  # of a launcher that was killed, the ranks are still there
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while left and time.monotonic() < deadline:
        left = [process for process in left if process.poll() is None]
        time.sleep(POLL_SECONDS)
    for process in processes:
        _signal(process, signal.SIGKILL)
    for process in left:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one in the hands of a broken disk or GPU
            process.wait(GRACE_SECONDS)


def _signal(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    try:
        os.killpg(process.pid, how)
    except (ProcessLookupError, PermissionError):
        return


def failure_of(name: str, code: int, logs: Path, log: Path | None) -> PhasedCptError:
    """What a rank has left word of; else how the first of them ended, and the end of its log.

    Of one that was killed the others only know that it is gone: their word counts for less, unless it is the user's.
    """
    words = _words(logs)
    if words and not (_killed(code) and words[0]["exit_code"] == 1):
        rank, message = words[0]["rank"], words[0]["message"]
        its_log = logs / f"rank{rank}.log"
        where = f" (rank {rank}; its output is in {its_log})" if words[0].get("unexpected") and its_log.exists() else ""
        error = PhasedCptError(f"{message}{where}")
        error.exit_code = words[0]["exit_code"]
        return error
    lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log and log.exists() else []
    shown = "".join(f"\n    {line}" for line in lines)
    return PhasedCptError(f"{name} {_how(code)}; its output is in {log or 'the lines above'}{shown}")


def _how(code: int) -> str:
    ended = _signal_of(code)
    why = ", as the system does when memory runs out" if ended == signal.SIGKILL else ""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}{why}"
    return f"ended with exit code {code}" + (f": a rank was ended by {ended.name}{why}" if ended else "")


def _words(logs: Path) -> list[dict[str, Any]]:
    """What ranks have left, the telling one first: others fail because it did, and with the general exit code."""
    paths = sorted(logs.glob("failed-*.json"), key=lambda path: path.stat().st_mtime_ns)
    words = [json.loads(path.read_text()) for path in paths]
    return sorted(words, key=lambda word: (word["exit_code"] == 1, word.get("unexpected", False)))
