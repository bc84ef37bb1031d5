"""The processes of a job are watched until all have ended well, or one has not.

stop asked ─→ SIGTERM to each rank, not to launchers: they kill after 30 s ─→ waited for, however long a step takes
save asked ─→ SIGUSR1 to each rank
no sign of any rank for too long ─→ SIGUSR2 to each rank, for its stacks ─→ told, and all are killed
"""

import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from phased_cpt.errors import Interrupted, PhasedCptError
from phased_cpt.launchers.commands import Environment
from phased_cpt.launchers.failures import signal_of, was_killed
from phased_cpt.launchers.hang import Patience, advice
from phased_cpt.launchers.processes import environment_of, hears, tell
from phased_cpt.launchers.running import Running
from phased_cpt.pulse import CLOSING, Pulse, pulses
from phased_cpt.stopping import Stopping, Wish

POLL_SECONDS = 0.05
LOOK_SECONDS = 0.25  # at wishes and pulses
STACKS_SECONDS = 1.0  # until they are written
REPORT_SECONDS = 1.0  # until the word of another node is here


class Hung(PhasedCptError):  # noqa: N818
    """No rank moves any more."""


class Supervision:
    """What the conductor knows of the job that it has started; `mark` is what its ranks have in their environment."""

    def __init__(
        self, running: Sequence[Running], logs: Path, stop: Stopping, hang_seconds: float, mark: Environment
    ) -> None:
        self._running, self._logs, self._mark = running, logs, mark
        self._stop, self._patience = stop, Patience(hang_seconds)
        self._asked = False  # to stop
        self._told: set[int] = set()  # of the ranks
        self.ended_early = False  # a process was ended in which no rank had begun
        self._next_look = 0.0

    def failed(self, grace_seconds: float) -> int | None:
        """Wait for all of them to end well, or for the first that does not; whoever was stopped, others are to follow
        by themselves, for so long.
        """
        deadline: float | None = None
        while True:
            codes = [one.poll() for one in self._running]
            ended = set(codes) - {None, 0}
            if None not in codes or ended - {Interrupted.exit_code}:
                break
            if ended:  # a rank was stopped; they have agreed on it, and the others leave within moments
                deadline = deadline or time.monotonic() + grace_seconds
                if time.monotonic() > deadline and not self._is_closing():
                    break
            self._look()
            time.sleep(POLL_SECONDS)
        # One that was killed drags the others along within a moment: it is the one to be told of.
        codes = self._reported(codes)
        killed = (at for at, code in enumerate(codes) if was_killed(code))
        return next(killed, next((at for at, code in enumerate(codes) if code), None))

    def _reported(self, codes: list[int | None]) -> list[int | None]:
        """Once more, where some of them are on other nodes, whose word takes a moment."""
        deadline = time.monotonic() + (REPORT_SECONDS if any(one.is_elsewhere for one in self._running) else 0.0)
        while None in codes and not any(map(was_killed, codes)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            codes = [one.poll() for one in self._running]
        return codes

    def _is_closing(self) -> bool:
        """Whether a rank that still lives has only its logs left to send."""
        signs = pulses(self._logs).values()
        return any(sign.doing == CLOSING and self._is_ours(sign) for sign in signs)

    def stopped_by(self, code: int | None) -> str:
        """Who has asked, where processes were ended as they had not begun to train."""
        asked = signal_of(code) == signal.SIGTERM and self._stop.wish() == Wish.STOP
        return self._stop.asked_by if self.ended_early or asked else ""

    def _look(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        signs = pulses(self._logs)
        signs |= {rank: sign for one in self._running for rank, sign in one.signs().items()}
        ranks = [sign for sign in signs.values() if self._is_ours(sign)]
        wish = self._stop.wish()
        if wish == Wish.STOP:
            self._ask_to_stop(ranks)
        elif wish == Wish.SAVE and self._ask(ranks, signal.SIGUSR1):  # else it is asked again: none has begun yet
            self._stop.saved()
        if message := self._patience.lost(signs):
            self._ask(ranks, signal.SIGUSR2)
            for one in self._running:
                one.ask_for_stacks()
            time.sleep(STACKS_SECONDS)
            raise Hung(f"{self._logs.parent.name}: {message}\n{advice(self._logs)}")

    def _is_ours(self, sign: Pulse) -> bool:
        """And not a process that has got the number of a rank which has ended."""
        environment = environment_of(sign.pid)
        return all(environment.get(name) == value for name, value in self._mark.items())

    def _ask_to_stop(self, ranks: Sequence[Pulse]) -> None:
        """Each rank once, also those that come later: a second signal means at once."""
        if not self._asked:
            self._asked = True
            said = f"{self._stop.asked_by}: stopping after this step, with a checkpoint; once more: at once\n"
            with contextlib.suppress(OSError):  # a terminal that was closed
                sys.stderr.write(said)
            for one in self._running:
                if (ended := one.ask_to_stop(ranks)) is not None:
                    self.ended_early = True
                    self._told.add(ended)
        for rank in ranks:
            if rank.pid not in self._told:
                tell(rank.pid, signal.SIGTERM)
                self._told.add(rank.pid)

    @staticmethod
    def _ask(ranks: Sequence[Pulse], how: signal.Signals) -> int:
        """How many of them have heard it."""
        hearing = [rank.pid for rank in ranks if hears(rank.pid, how)]
        for pid in hearing:
            tell(pid, how)
        return len(hearing)
