"""What signals, and the clock, ask of a run: to save and go on, or to save and stop.

SIGTERM, SIGINT, SIGHUP   stop: after this step, with a checkpoint      once more, a moment later: at once
SIGUSR1                   a checkpoint, and on

Nothing is lost by leaving anywhere: what is written is written beside and renamed. So a signal ends a process where it
is, as an exception, but for the stretches that are `held`: there it is a wish, and granted between two steps.

signal ─ the main thread, when Python gets to it ─→ exception, or wish
       ─ a thread, which does not wait for that  ─→ the end, at a second one, or where that hangs in a library
"""

import contextlib
import errno
import os
import select
import signal
import termios
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from types import FrameType
from typing import NoReturn

from phased_cpt.errors import Interrupted

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ASKED_BY: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGALRM: "the time that --minutes gives is over"}
# A Ctrl-C reaches every process of a terminal, and launchers pass it on: what comes together is one wish.
TOGETHER_SECONDS = 1.0
LEAVING_SECONDS = 3.0  # for the main thread to leave by itself, where nothing holds it
LOOK_SECONDS = 0.2


class Asked(BaseException):
    """A stop on its way up, which no `except Exception` of any library takes for a failure of its own."""


class Wish(IntEnum):
    """In the order of their weight: the ranks agree on the greatest."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Stopping:
    """What is asked of this process."""

    def __init__(self) -> None:
        self.asked_by = ""
        self._asked = self._raised = self._save = self._held = False
        self._has_ears = False
        self._free_since = time.monotonic()

    def stop_in(self, seconds: float) -> None:
        """The clock asks as a signal does, because it is one; but where Python allows no handlers."""
        if self._has_ears:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        else:
            timer = threading.Timer(seconds, self._ask, [signal.SIGALRM])
            timer.daemon = True
            timer.start()

    def wish(self) -> Wish:
        """What is asked for now."""
        if self._asked:
            return Wish.STOP
        return Wish.SAVE if self._save else Wish.NOTHING

    def saved(self) -> None:
        """What SIGUSR1 has asked for is done."""
        self._save = False

    def require_on(self) -> None:
        """Go no further where a stop is asked for."""
        if self._asked:
            raise self.as_failure()

    def as_failure(self) -> Interrupted:
        """In words, for whoever is told."""
        return Interrupted(f"stopped ({self.asked_by}); the same command goes on")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """In here, a stop is a wish that is asked for in `wish`."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held, self._free_since = before, time.monotonic()

    def hear(self, number: int, frame: FrameType | None) -> None:
        """In the main thread."""
        if number == signal.SIGUSR1:
            self._save = True
            return
        self._ask(number)
        if not self._held and not self._raised:
            self._raised = True
            raise Asked

    def _ask(self, number: int) -> None:
        if not self._asked:
            self.asked_by, self._asked = ASKED_BY.get(number) or signal.Signals(number).name, True

    def listen(self, pipe: int) -> None:
        """In a thread of its own: a byte in the pipe for each signal, until the pipe is closed."""
        first: float | None = None
        while True:
            if select.select([pipe], [], [], LOOK_SECONDS if first else None)[0]:
                numbers = os.read(pipe, 64)
                if not numbers:
                    return
                for number in [each for each in numbers if each in STOPS]:
                    if first is None:
                        first = time.monotonic()
                        leave_a_closed_terminal()
                        self._ask(number)
                    elif time.monotonic() - first > TOGETHER_SECONDS:
                        _end("asked twice: stopped at once\n")
            if first and not self._held and time.monotonic() - max(first, self._free_since) > LEAVING_SECONDS:
                _end("stopped; the same command goes on\n")


def _end(message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
    os._exit(Interrupted.exit_code)


_heard: Stopping | None = None


@contextlib.contextmanager
def heard() -> Iterator[Stopping]:
    """Signals are heard in here; whoever asks again, further in, gets the same ears. Outside, a stop is a failure."""
    global _heard
    if _heard is not None:
        yield _heard
        return
    _heard = Stopping()
    try:
        with _ears(_heard):
            yield _heard
    except Asked:
        raise _heard.as_failure() from None
    finally:
        _heard = None


@contextlib.contextmanager
def _ears(stopping: Stopping) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    reads, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    stopping._has_ears = True
    before, pipe = {}, signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    listening = threading.Thread(target=stopping.listen, args=[reads], name="signals", daemon=True)
    listening.start()
    try:
        for number in (*STOPS, signal.SIGALRM, signal.SIGUSR1):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            before[number] = signal.signal(number, stopping.hear)
        yield
    finally:
        stopping._raised = True  # an exception in the midst of this would leave half of the handlers behind
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(pipe)
        os.close(writes)
        listening.join()
        os.close(reads)


_ALL = (*STOPS, signal.SIGUSR1)
_before_the_fork: set[int | signal.Signals] = set()


def _before_a_fork() -> None:
    """A child that is signalled before it has its own ears would write into the pipe of its parent."""
    global _before_the_fork
    _before_the_fork = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)


def _after_a_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_the_fork)


def _in_a_forked_child() -> None:
    global _heard
    if _heard is not None:
        signal.set_wakeup_fd(-1)
        for number in _ALL:
            signal.signal(number, signal.SIG_DFL)
        _heard = None
    _after_a_fork()


os.register_at_fork(before=_before_a_fork, after_in_parent=_after_a_fork, after_in_child=_in_a_forked_child)


def leave_a_closed_terminal() -> None:
    """Print to nowhere from now on, where there is nobody any more who reads: it would be an error, and end a stop."""
    for file in (1, 2):
        try:
            termios.tcgetattr(file)
        except termios.error as error:  # of a file or a pipe it says ENOTTY
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, file)
                os.close(nowhere)
