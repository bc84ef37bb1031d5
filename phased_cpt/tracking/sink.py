"""What a sink is, what it knows of the phase that it writes for, and all sinks as one, which never stops training."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

from phased_cpt.errors import PhasedCptError

# One step or one evaluation, complete as the trainer gives it; an evaluation is known by its eval_loss.
Line = dict[str, Any]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class WandbSettings:
    """Where in Weights & Biases; `id` is the run's own and the same in all its phases and restarts."""

    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    id: str


@dataclass(frozen=True)
class Stretch:
    """What a sink needs to know of the phase that it writes for."""

    root: Path  # the run folder
    run: str  # the run's name
    folder: str  # the phase's folder, relative to root
    phase: str  # the phase's name
    number: int  # 2 of
    of: int  # 3 phases
    steps: int  # of this phase
    steps_before: int  # of all earlier phases: step 0 of this one on the axis of the curriculum
    begin: int  # the step at which this attempt goes on; 0: a fresh start
    attempt: int
    tensorboard: bool
    wandb: WandbSettings | None

    @property
    def logs(self) -> Path:
        """The phase's own folder of logs."""
        return self.root / self.folder / "logs"

    @property
    def title(self) -> str:
        return f"phase {self.number}/{self.of} {self.phase}"

    def curriculum_step(self, line: Line) -> int:
        return self.steps_before + int(line["step"])


class Sink(Protocol):
    """One place that figures are written to. It may raise whatever it likes: see Sinks."""

    def train(self, line: Line) -> None: ...

    def evaluated(self, line: Line) -> None: ...

    def tell(self, message: str) -> bool:
        """Something the user should know; whether it can be read here."""

    def close(self) -> None: ...


class Sinks:
    """All sinks as one. Whoever raises is told once, by the others or on stderr, and left out from then on."""

    def __init__(self, sinks: dict[str, Sink]) -> None:
        self._sinks = dict(sinks)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def train(self, line: Line) -> None:
        for name in tuple(self._sinks):
            self._try(name, lambda sink: sink.train(line))

    def evaluated(self, line: Line) -> None:
        for name in tuple(self._sinks):
            self._try(name, lambda sink: sink.evaluated(line))

    def tell(self, message: str) -> bool:
        told = [self._try(name, lambda sink: sink.tell(message)) for name in tuple(self._sinks)]
        if not any(told):
            _last_resort(message)
        return True

    def close(self) -> None:
        """From the end of the list: who shows warnings stands at its beginning."""
        for name in reversed(tuple(self._sinks)):
            self._try(name, lambda sink: sink.close())
            self._sinks.pop(name, None)

    def warn(self, name: str, reason: Exception) -> None:
        kind = "" if isinstance(reason, PhasedCptError) else f"{type(reason).__name__}: "
        why = " ".join(str(reason).split())  # some tell theirs in many lines
        self.tell(f"tracking: {name} is left out from here on, training goes on: {kind}{why}")

    def _try(self, name: str, call: Callable[[Sink], Answer]) -> Answer | None:
        if name not in self._sinks:  # left out a moment ago, while another one's failure was told
            return None
        try:
            return call(self._sinks[name])
        except Exception as reason:
            sink, why = self._sinks.pop(name), reason
        with contextlib.suppress(Exception):  # what it holds, a bar on the terminal say, goes if it can
            sink.close()
        self.warn(name, why)
        return None


def _last_resort(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone, too
        sys.stderr.write(f"{message}\n")
