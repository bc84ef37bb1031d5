"""Processes are started, watched and ended: all of them, or none is left.

started ─ all ended well ──────────────────────────────→ done
        ─ one has failed ─ the others are ended ───────→ the first failure is told
        ─ Ctrl-C or SIGTERM here ─ all of them are ended ─→ passed on
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phased_cpt.errors import PhasedCptError
from phased_cpt.launchers.commands import Command

POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0  # between asking a process to end and ending it
LAST_LINES = 15


def launched(commands: Sequence[Command], logs: Path) -> None:
    """Run the processes of a job to their end."""
    logs.mkdir(parents=True, exist_ok=True)
    for left in logs.glob("failed-*.json"):
        left.unlink()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            processes.append(_started(command))
        failed = _watched(processes)
    finally:
        _end(processes)
    if failed is not None:
        raise failure_of(failed, processes[failed].returncode, logs, commands[failed].log)


def _watched(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all of them to end well, or for the first that does not."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            return next(at for at, code in enumerate(codes) if code)
        if None not in codes:
            return None
        time.sleep(POLL_SECONDS)


def _started(command: Command) -> subprocess.Popen[bytes]:
    """In a session of its own: a Ctrl-C reaches the conductor alone, who ends them in order."""
    environment = {**os.environ, **command.environment}
    output = command.log.open("wb") if command.log else None
    try:
        return subprocess.Popen(  # noqa: S603
            command.words, env=environment, stdout=output, stderr=output and subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    finally:
        if output:
            output.close()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Whoever still runs is asked to end, and then made to; a launcher's ranks are in its session, and end with it."""
    left = [process for process in processes if process.poll() is None]
    for how, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        for process in left:
            _signal(process, how)
        deadline = time.monotonic() + patience
        while left and time.monotonic() < deadline:
            left = [process for process in left if process.poll() is None]
            time.sleep(POLL_SECONDS)


def _signal(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    try:
        os.killpg(process.pid, how)
    except (ProcessLookupError, PermissionError):
        return


def failure_of(process: int, code: int, logs: Path, log: Path | None) -> PhasedCptError:
    """What a rank has left word of; else how the first of them ended, and the end of its log."""
    if words := _words(logs):
        error = PhasedCptError(words[0]["message"])
        error.exit_code = words[0]["exit_code"]
        return error
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log and log.exists() else []
    shown = "".join(f"\n    {line}" for line in lines)
    return PhasedCptError(f"process {process} of the job {how}; its output is in {log or 'the lines above'}{shown}")


def _words(logs: Path) -> list[dict[str, Any]]:
    """What ranks have left, the telling one first: others fail because it did, and with the general exit code."""
    paths = sorted(logs.glob("failed-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return sorted((json.loads(path.read_text()) for path in paths), key=lambda word: word["exit_code"] == 1)
