"""How a job has ended, told once: by the word that a rank has left, or else by how its process ended."""

import json
import signal
from pathlib import Path
from typing import Any

from phased_cpt.errors import Interrupted, PhasedCptError

LAST_LINES = 15
GOES_ON = "the same command goes on"


def failure_of(name: str, code: int, logs: Path, log: Path | None, stopped_by: str = "") -> PhasedCptError:
    """What a rank has left word of; else how the first of them ended, and the end of its log.

    Of one that was killed the others only know that it is gone: their word counts for less, unless it is the user's.
    `stopped_by`: they were asked to stop when none of them had begun to train, and ended as processes do.
    """
    words = _words(logs)
    follows = was_killed(code) and words and words[0]["exit_code"] == 1
    if words and not follows and not (stopped_by and words[0].get("unexpected")):
        return _told(words[0], logs)
    if stopped_by:
        return Interrupted(f"stopped ({stopped_by}) before anything was trained in this call; {GOES_ON}")
    if code == Interrupted.exit_code or signal_of(code) == signal.SIGTERM:  # which it was asked to die of, so early
        return Interrupted(f"{name} was stopped; {GOES_ON}")
    lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log and log.exists() else []
    shown = "".join(f"\n    {line}" for line in lines)
    return PhasedCptError(f"{name} {_how(code)}; its output is in {log or 'the lines above'}{shown}")


def _told(word: dict[str, Any], logs: Path) -> PhasedCptError:
    if word["exit_code"] == Interrupted.exit_code:
        return Interrupted(word["message"])
    its_log = logs / f"rank{word['rank']}.log"
    where = f" (rank {word['rank']}; its output is in {its_log})" if word.get("unexpected") and its_log.exists() else ""
    error = PhasedCptError(f"{word['message']}{where}")
    error.exit_code = word["exit_code"]
    return error


def _words(logs: Path) -> list[dict[str, Any]]:
    """What ranks have left, the telling one first."""
    paths = sorted(logs.glob("failed-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return sorted((json.loads(path.read_text()) for path in paths), key=_telling)


def _telling(word: dict[str, Any]) -> int:
    """What a user can mend, with an exit code of its own; what fails in general; then, as they came, a stop and what
    nobody has foreseen: a rank that leaves with a full disk drags others into a stop, one that is stopped drags others
    into a broken connection.
    """
    if word.get("unexpected") or word["exit_code"] == Interrupted.exit_code:
        return 2
    return 1 if word["exit_code"] == 1 else 0


def was_killed(code: int | None) -> bool:
    """From outside, or by what it did to memory; an abort is how libraries end themselves."""
    return signal_of(code) not in (None, signal.SIGABRT)


def signal_of(code: int | None) -> signal.Signals | None:
    """What ended it; a launcher says of a rank that was killed what a shell or C would: 137, or 247."""
    if code is None or 0 <= code <= 128 or code == 255:
        return None
    known = set(signal.Signals)
    return next((signal.Signals(number) for number in (-code, code - 128, 256 - code) if number in known), None)


def _how(code: int) -> str:
    ended = signal_of(code)
    why = ", as the system does when memory runs out" if ended == signal.SIGKILL else ""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}{why}"
    return f"ended with exit code {code}" + (f": a rank was ended by {ended.name}{why}" if ended else "")
