"""What a check says: a verdict, what was found, and what to do about it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from phased_cpt.preflight.scene import Scene

Verdict = Literal["ok", "skip", "warn", "fail"]
RISING: tuple[Verdict, ...] = ("ok", "skip", "warn", "fail")
AGAIN = "as it says; then call `phased-cpt preflight` again"
MEANT = "nothing, if that is meant"


@dataclass(frozen=True)
class Seen:
    """One thing that a check has found."""

    verdict: Verdict
    found: str
    fix: str = ""  # nothing, where all is well


Check = Callable[[Scene], Iterator[Seen]]


def ok(found: str) -> Seen:
    return Seen("ok", found)


def skip(why: str) -> Seen:
    return Seen("skip", why)


def warn(found: str, fix: str) -> Seen:
    return Seen("warn", found, fix)


def fail(found: str, fix: str) -> Seen:
    return Seen("fail", found, fix)


def told(text: str, verdict: Verdict = "fail") -> Seen:
    """An error of ours, which ends in what to do about it."""
    found, _, fix = text.rpartition("; ")
    if found and "\n" not in text:
        return Seen(verdict, found, fix)
    return Seen(verdict, text, MEANT if verdict == "warn" else AGAIN)
