"""What a job is made of while it runs: processes of this machine, and the ranks of other nodes, seen alike."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from phased_cpt.errors import PhasedCptError
from phased_cpt.launchers.commands import Command, Environment
from phased_cpt.launchers.failures import failure_of
from phased_cpt.launchers.processes import is_below
from phased_cpt.pulse import Pulse


class Running(Protocol):
    """Started, and perhaps ended."""

    is_elsewhere: bool  # its word takes a moment

    def poll(self) -> int | None:
        """How it has ended, once it has."""

    def ask_to_stop(self, ranks: Sequence[Pulse]) -> int | None:
        """Ranks that have begun are told one by one; a process without any is ended: which one that was."""

    def ask_for_stacks(self) -> None:
        """Of its ranks, where no signal from here reaches them."""

    def end(self, how: signal.Signals) -> None:
        """It, and whatever it has started."""

    def wait(self, seconds: float) -> None:
        """Until it is gone, but no longer."""

    def signs(self) -> Mapping[int, Pulse]:
        """Of its ranks, where no file of this machine holds them."""

    def failure(self, logs: Path, stopped_by: str) -> PhasedCptError:
        """What its end means."""


class Part(Protocol):
    """What can be started."""

    def start(self, mark: Environment) -> Running: ...


class OwnProcess:
    """A process here, in a session of its own: a Ctrl-C reaches the conductor alone, who ends it in order."""

    is_elsewhere = False

    def __init__(self, command: Command, mark: Environment) -> None:
        self._command = command
        environment = {**os.environ, **command.environment, **mark}
        output = command.log.open("wb") if command.log else None
        try:
            self._process = subprocess.Popen(  # noqa: S603
                command.words, env=environment, stdout=output, stderr=output and subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        finally:
            if output:
                output.close()

    def poll(self) -> int | None:
        return self._process.poll()

    def ask_to_stop(self, ranks: Sequence[Pulse]) -> int | None:
        if any(is_below(rank.pid, self._process.pid) for rank in ranks):
            return None
        self.end(signal.SIGTERM)  # nothing is lost: no job trains before all are there
        return self._process.pid

    def ask_for_stacks(self) -> None:
        """Supervision has told each rank."""

    def end(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, how)

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one in the hands of a broken disk or GPU
            self._process.wait(seconds)

    def signs(self) -> Mapping[int, Pulse]:
        return {}

    def failure(self, logs: Path, stopped_by: str) -> PhasedCptError:
        return failure_of(self._command.name, self._process.returncode, logs, self._command.log, stopped_by)
