"""Between a user and `deepspeed`, whose signals end the program that is called, and leave the ranks to train on.

guard ─ deepspeed ─ launch.py ─ ranks           the last three in a session of their own: no Ctrl-C of a terminal there

SIGTERM, SIGINT, SIGHUP   to the ranks, once: this step, a checkpoint, exit code 75      once more: all are killed
SIGUSR1                   to the ranks: a checkpoint, and on

python -m phased_cpt.launchers.guard deepspeed --module phased_cpt …          launch/bin/deepspeed calls it so
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType

from phased_cpt.errors import Interrupted
from phased_cpt.launchers.failures import signal_of
from phased_cpt.launchers.parents import GUARD, LAUNCH, guard_mark
from phased_cpt.launchers.processes import (
    GONE,
    everyone,
    hears,
    is_below,
    parent_of,
    session_of,
    state_of,
    tell,
    words_of,
)
from phased_cpt.stopping import STOPS, TOGETHER_SECONDS

POLL_SECONDS = 0.05
LOOK_SECONDS = 1.0  # for new ranks


class Guard:
    """What was asked, and of whom it was asked on."""

    def __init__(self) -> None:
        self._first: float | None = None  # when the first stop was asked for
        self._again = self._save = False
        self._told: set[int] = set()
        self._ended_early = False  # before there was a rank that could have stopped
        self._launchers: set[int] = set()
        self._ranks: set[int] = set()
        self._orphaned = False  # one of those between here and the ranks has died before them
        self._next_look = 0.0

    def run(self, words: list[str]) -> int:
        """Call what is guarded, see it to its end, and return its exit code."""
        with self._hearing():
            environment = os.environ | {GUARD: guard_mark()}
            called = subprocess.Popen(  # noqa: S603
                words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
            while not self._again and not self._ended(called):
                self._pass_on(called.pid)
                self._look_for_orphans(called)
                time.sleep(POLL_SECONDS)
            if self._again:
                self._kill_all(called)
                return Interrupted.exit_code
            return self._code(called.returncode)

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        before = {}
        for number in (*STOPS, signal.SIGUSR1):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            before[number] = signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._next_look = 0.0
        if number == signal.SIGUSR1:
            self._save = True
        elif self._first is None:
            self._first = time.monotonic()
        elif time.monotonic() - self._first > TOGETHER_SECONDS:
            self._again = True

    def _ended(self, called: subprocess.Popen[bytes]) -> bool:
        """With its ranks, also those that have come since the last look."""
        if called.poll() is None or self._left(called.pid):
            return False
        self._look_for_ranks(called.pid)
        return not self._left(called.pid)

    def _pass_on(self, called: int) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._look_for_ranks(called)
        if self._save:
            self._save = False
            for rank in filter(lambda rank: hears(rank, signal.SIGUSR1), self._ranks):
                tell(rank, signal.SIGUSR1)
        if self._first is not None:
            self._ask_to_stop(called)

    def _look_for_ranks(self, called: int) -> None:
        """The children of launch.py. One that is gone has none any more, and those that were known stay so."""
        ours = [each for each in everyone() if session_of(each) == called]
        self._launchers |= {each for each in ours if LAUNCH in words_of(each)}
        self._ranks |= {each for each in ours if parent_of(each) in self._launchers}

    def _look_for_orphans(self, called: subprocess.Popen[bytes]) -> None:
        """Their end is a stop: ranks hear of it. Of a launch.py that was killed, `deepspeed` says 0."""
        if self._ranks and (called.returncode is not None or not _alive(self._launchers)):
            self._orphaned |= bool(_alive(self._ranks))

    def _ask_to_stop(self, called: int) -> None:
        if not self._ranks and not self._told:
            self._ended_early = True
            self._told.add(called)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(called, signal.SIGTERM)
        for rank in self._ranks - self._told:
            self._ended_early |= not hears(rank, signal.SIGTERM)  # it is still at its imports, and ends
            self._told.add(rank)
            tell(rank, signal.SIGTERM)

    def _left(self, called: int) -> list[int]:
        """Who was called is gone; its session keeps its number until they all are."""
        return [each for each in _alive(self._launchers | self._ranks) if session_of(each) == called]

    @staticmethod
    def _kill_all(called: subprocess.Popen[bytes]) -> None:
        for each in everyone():
            if session_of(each) == called.pid or is_below(each, called.pid):
                tell(each, signal.SIGKILL)
        called.wait()

    def _code(self, code: int) -> int:
        """That of the ranks, which launch.py passes on; 75 where they were ended, or told by the end of a launcher."""
        by_us = self._first is not None and (self._ended_early or signal_of(code) == signal.SIGTERM)
        if (code != 0 and by_us) or (code <= 0 and self._orphaned):
            return Interrupted.exit_code
        return code if code >= 0 else 128 - code


def _alive(processes: set[int]) -> list[int]:
    return [each for each in processes if state_of(each) != GONE]


if __name__ == "__main__":
    sys.exit(Guard().run(sys.argv[1:]))
