"""Where each rank is, and since when: a line in a file of its own, which whoever supervises them reads.

rank ─ a few times a step ─→ <phase>/logs/pulse-<rank>.json ─→ conductor, or the other ranks
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

CLOSING = "closing the logs"  # which may wait for a server
LINE_BYTES = 256  # written in one piece, and filled up with blanks: a reader never sees half of one


@dataclass(frozen=True)
class Pulse:
    """The last sign of a rank."""

    rank: int
    pid: int
    host: str
    doing: str  # "loading the model"
    step: int
    at: float  # on the monotonic clock, which all processes of a host share
    state: str | None = None  # what the system says of it, of one on another host


class Beating:
    """A rank's own pulse; a beat costs a microsecond or two."""

    def __init__(self, logs: Path, rank: int) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._path = logs / f"pulse-{rank}.json"
        self._rank, self._host = rank, socket.gethostname()
        self._doing, self._step = "starting", 0
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.beat()

    def beat(self, doing: str | None = None, step: int | None = None) -> None:
        """A sign of progress; what is not said stays as it was."""
        self._doing = doing or self._doing
        self._step = self._step if step is None else step
        now = Pulse(self._rank, os.getpid(), self._host, self._doing, self._step, time.monotonic())
        os.pwrite(self._file, json.dumps(asdict(now)).encode()[:LINE_BYTES].ljust(LINE_BYTES), 0)

    @property
    def where(self) -> str:
        """For a message."""
        return f"step {self._step}, {self._doing}"

    def close(self) -> None:
        os.close(self._file)
        self._path.unlink(missing_ok=True)


def pulses(logs: Path) -> dict[int, Pulse]:
    """The last sign of each rank of this host."""
    found = {}
    for path in logs.glob("pulse-*.json"):
        try:
            pulse = Pulse(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):  # being made, or gone just now
            continue
        if pulse.host == socket.gethostname():
            found[pulse.rank] = pulse
    return found
