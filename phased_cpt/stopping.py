"""What signals, and the clock, ask of a run: to save and go on, or to save and stop.

SIGTERM, SIGINT, SIGHUP   stop: after this step, with a checkpoint      once more, a moment later: at once
SIGUSR1                   a checkpoint, and on

Nothing is lost by leaving anywhere: what is written is written beside and renamed. So a signal ends a process where it
is, as an exception, but for the stretches that are `held`: there it is a wish, and granted between two steps.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from types import FrameType

from phased_cpt.errors import Interrupted

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ASKED_BY: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGALRM: "the time that --minutes gives is over"}
# A Ctrl-C reaches every process of a terminal, and launchers pass it on: what comes together is one wish.
TOGETHER_SECONDS = 1.0


class Wish(IntEnum):
    """In the order of their weight: the ranks agree on the greatest."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Stopping:
    """What is asked of this process."""

    def __init__(self) -> None:
        self.asked_by = ""
        self._first: float | None = None
        self._save = False
        self._held = False

    def stop_in(self, seconds: float) -> None:
        """The clock asks as a signal does, because it is one."""
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def wish(self) -> Wish:
        """What is asked for now."""
        if self._first is not None:
            return Wish.STOP
        return Wish.SAVE if self._save else Wish.NOTHING

    def saved(self) -> None:
        """What SIGUSR1 has asked for is done."""
        self._save = False

    def require_on(self) -> None:
        """Go no further where a stop is asked for."""
        if self.wish() == Wish.STOP:
            raise Interrupted(f"stopped ({self.asked_by}); the same command goes on")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """In here, a stop is a wish that is asked for in `wish`."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self.asked_by = now, ASKED_BY.get(number) or signal.Signals(number).name
            if not self._held:
                self.require_on()
        elif now - self._first > TOGETHER_SECONDS and number != signal.SIGALRM:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"asked twice: stopped at once\n")
            os._exit(Interrupted.exit_code)


_heard: Stopping | None = None


@contextlib.contextmanager
def heard() -> Iterator[Stopping]:
    """Signals are heard in here; whoever asks again, further in, gets the same ears."""
    global _heard
    if _heard is not None:
        yield _heard
        return
    _heard, before = Stopping(), {}
    try:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (*STOPS, signal.SIGALRM, signal.SIGUSR1):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                before[number] = signal.signal(number, _heard.hear)
        yield _heard
    finally:
        if before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _heard = None
