"""Ranks that give no sign any more: who is stalled, and who waits for it.

first door    the conductor looks at their pulses ─→ tells, and ends them
second door   each rank looks at the pulses of all ─→ writes its stacks, tells, and ends itself
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from phased_cpt.launchers.processes import GONE, state_of, tell
from phased_cpt.pulse import Pulse, pulses

LOOK_SECONDS = 1.0
# Who has not looked for so long was frozen itself (a laptop that slept, a container that was paused), and so were
# those it looks at: everybody's patience begins anew.
FROZEN_SECONDS = 30.0
STATES = {  # the first is the first to be suspected
    GONE: "its process is gone",
    "T": "stopped by a signal",
    "t": "held by a debugger",
    "D": "waits for a disk or a device",
}


def stalled(
    signs: Mapping[int, Pulse],
    since: float,
    hang_seconds: float,
    now: float,
    state: Callable[[int], str] = state_of,
) -> str | None:
    """Who gives no sign any more, if nobody has since then; as long as one of them does, the others may wait for it."""
    newest = max([since, *(sign.at for sign in signs.values() if sign.at <= now)])
    if now - newest <= hang_seconds:
        return None
    waited = f"{now - newest:.0f} s (launch.hang_minutes: {hang_seconds / 60:g})"
    if not signs:
        return f"for {waited} no rank has come so far as to give a sign; it may be its imports, or a disk"
    suspected = list(STATES)
    found = [(state(sign.pid) if sign.state is None else sign.state, sign) for _, sign in sorted(signs.items())]
    found.sort(key=lambda each: (suspected.index(each[0]) if each[0] in STATES else len(STATES), each[1].at))
    lines = [f"    rank {sign.rank}: {_shown(sign, now, STATES.get(letter))}" for letter, sign in found]
    return "\n".join([f"no rank has given a sign for {waited}; the first of these is the one to look at:", *lines])


def _shown(sign: Pulse, now: float, state: str | None) -> str:
    where = f"on {sign.host}, " if sign.state is not None else ""
    parts = [f"{where}{sign.doing}, step {sign.step}", f"its last sign was {now - sign.at:.0f} s ago"]
    return "; ".join([*parts, state] if state else parts)


def advice(logs: Path) -> str:
    """What a user does then."""
    return (
        f"where each of them stood is in {logs}/stacks-<rank>.txt. "
        "The same command goes on from the last checkpoint; if they were only slow, raise launch.hang_minutes"
    )


class Patience:
    """How long ranks are waited for, by one that looks at them again and again."""

    def __init__(self, hang_seconds: float) -> None:
        self._hang_seconds = hang_seconds
        self._since = self._looked = time.monotonic()

    def lost(self, signs: Mapping[int, Pulse]) -> str | None:
        """What there is to tell, once it is."""
        now = time.monotonic()
        if now - self._looked > FROZEN_SECONDS:
            self._since = now
        self._looked = now
        # A rank that ends well takes its pulse with it: the last sign counts on.
        self._since = max([self._since, *(sign.at for sign in signs.values() if sign.at <= now)])
        return stalled(signs, self._since, self._hang_seconds, now)


class Watchdog:
    """In a rank of the second door, where nobody stands above the ranks that knows them."""

    def __init__(self, logs: Path, rank: int, hang_seconds: float) -> None:
        self._logs, self._rank = logs, rank
        self._hang_seconds = hang_seconds
        self._done = threading.Event()
        self._launcher = os.getppid()

    def __enter__(self) -> "Watchdog":
        self._forget_the_dead()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()

    def _forget_the_dead(self) -> None:
        """The pulses of an earlier attempt, which had more ranks, it may be."""
        for rank, sign in pulses(self._logs).items():
            if state_of(sign.pid) == GONE:
                (self._logs / f"pulse-{rank}.json").unlink(missing_ok=True)

    def _watch(self) -> None:
        patience = Patience(self._hang_seconds)
        while not self._done.wait(LOOK_SECONDS):
            signs = pulses(self._logs)
            if message := patience.lost(signs):
                self._leave(message, signs)

    def _leave(self, message: str, signs: Mapping[int, Pulse]) -> None:
        """The others are about to do the same; the first that can tells it for all."""
        stopped = [sign for sign in signs.values() if state_of(sign.pid) in ("T", "t")]
        awake = [sign.rank for sign in signs.values() if sign not in stopped and state_of(sign.pid) != GONE]
        with contextlib.suppress(OSError):  # a full disk, a terminal that is closed
            with (self._logs / f"stacks-{self._rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            if self._rank == min([self._rank, *awake]):
                sys.stderr.write(f"{self._logs.parent.name}: {message}\n{advice(self._logs)}\n")
                sys.stderr.flush()
        time.sleep(2 * LOOK_SECONDS)  # a launcher ends everybody with the first that goes: all stacks are wanted
        if os.getppid() != self._launcher:
            # Else it kills them itself, after 30 s, and its exit code is that of the first that goes: of this one.
            for sign in stopped:
                tell(sign.pid, signal.SIGKILL)
        os._exit(1)
