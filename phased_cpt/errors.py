"""What a user can fix. Anything else keeps its traceback.

PhasedCptError            1   the family; its text is all that a user sees
├── InputError            2   what was typed, or a file that was named
│   └── ConfigError       2   every problem of a configuration, at once
├── PreflightFailed       3   a check before the launch says that it would fail
├── LedgerRefuses         4   what was done no longer matches what is asked for
├── Diverged              5   training left the numbers
├── GateClosed            6   a phase does not hold what its gate asks for
├── Interrupted          75   stopped from outside; the same command goes on
└── RunIsBusy             1   another run holds the folder
"""

from collections.abc import Sequence
from dataclasses import dataclass


class PhasedCptError(Exception):
    """A failure that is told in one message, without a traceback."""

    exit_code = 1
    ended: int | None = None  # how the process has ended that it tells of


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


class PreflightFailed(PhasedCptError):  # noqa: N818
    """What a run needs is not there."""

    exit_code = 3


class LedgerRefuses(PhasedCptError):  # noqa: N818 - reads as the sentence that it is
    """What was done no longer matches what is asked for."""

    exit_code = 4


class Diverged(PhasedCptError):  # noqa: N818
    """The loss, or the gradient, is no number any more."""

    exit_code = 5

    def __init__(self, step: int, blocks: Sequence[int], what: str = "the loss") -> None:
        shown = ", ".join(map(str, blocks[:8])) + (" …" if len(blocks) > 8 else "")
        where = f" (blocks {shown}; `phased-cpt prepare --inspect PHASE:N` shows one)" if blocks else ""
        mend = "try a lower training.learning_rate, a longer warm-up, or model.precision bf16 in place of fp16"
        super().__init__(f"step {step}: {what} is not finite{where}; nothing of this step was kept. {mend}")


class GateClosed(PhasedCptError):  # noqa: N818
    """A phase is trained, and is not published: it taught too little, or made too much forgotten."""

    exit_code = 6


class Interrupted(PhasedCptError):  # noqa: N818
    """Stopped from outside."""

    exit_code = 75


class RunIsBusy(PhasedCptError):  # noqa: N818
    """Another run holds this folder."""
