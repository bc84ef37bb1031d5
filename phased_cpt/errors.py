"""What a user can fix. Anything else keeps its traceback.

PhasedCptError            1   the family; its text is all that a user sees
├── InputError            2   what was typed, or a file that was named
│   └── ConfigError       2   every problem of a configuration, at once
├── LedgerRefuses         4   what was done no longer matches what is asked for
└── RunIsBusy             1   another run holds the folder
"""

from collections.abc import Sequence
from dataclasses import dataclass


class PhasedCptError(Exception):
    """A failure that is told in one message, without a traceback."""

    exit_code = 1


class InputError(PhasedCptError):
    """What was typed cannot be used."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration, and where."""

    path: str  # training.learning_rate
    message: str  # what was given; what is allowed; did you mean …
    where: str = ""  # run.yaml:12, or --set

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.path, self.message) if part)


class ConfigError(InputError):
    """A configuration that cannot be used, with all that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class LedgerRefuses(PhasedCptError):  # noqa: N818 - reads as the sentence that it is
    """What was done no longer matches what is asked for."""

    exit_code = 4


class RunIsBusy(PhasedCptError):  # noqa: N818
    """Another run holds this folder."""
