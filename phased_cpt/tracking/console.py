"""How training comes along, on stderr: a bar on a terminal, a line now and then in a log."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from phased_cpt.tracking.figures import is_evaluation, is_finite
from phased_cpt.tracking.sink import Line, Sink, Stretch

LOG_SECONDS = 10.0


def open_console(stretch: Stretch) -> Sink:
    return Terminal(stretch) if sys.stderr.isatty() else Log(stretch)


def plain(line: Line, stretch: Stretch) -> str:
    """A step or an evaluation as one line of text."""
    words = _evaluation(line) if is_evaluation(line) else f"step {line['step']}/{stretch.steps}, {_step(line)}"
    return f"{stretch.title}: {words}"


def _step(line: Line) -> str:
    return (
        f"loss {_number(line, 'loss', '.3f')}, lr {_number(line, 'learning_rate', '.2g')}, "
        f"{_number(line, 'tokens_per_second', ',.0f')} tokens/s, "
        f"ETA {_time(line, 'eta_seconds')} (curriculum {_time(line, 'curriculum_eta_seconds')})"
    )


def _evaluation(line: Line) -> str:
    perplexity = line.get("perplexity")
    shape = ",.1f" if is_finite(perplexity) and abs(perplexity or 0) < 1e6 else ".3g"
    tokens = _number(line, "tokens", ",.0f")
    return (
        f"step {line['step']}, held-out loss {_number(line, 'eval_loss', '.3f')}, "
        f"perplexity {_number(line, 'perplexity', shape)} ({tokens} tokens of {line['dataset']})"
    )


def _number(line: Line, field: str, shape: str) -> str:
    """nan and inf stand as they are: the user should see them; what is not known is a question mark."""
    value = line.get(field)
    return "?" if value is None else format(float(value), shape)


def _time(line: Line, field: str) -> str:
    seconds = line.get(field)
    return str(timedelta(seconds=round(seconds))) if seconds is not None and is_finite(seconds) else "?"


class Log:
    """Not a terminal: the first step, the last and one each ten seconds, and every evaluation."""

    def __init__(self, stretch: Stretch) -> None:
        self._stretch = stretch
        self._told: float | None = None
        self._untold: Line | None = None

    def train(self, line: Line) -> None:
        self._untold = line
        if self._told is None or time.monotonic() - self._told >= LOG_SECONDS:
            self._tell_step()

    def evaluated(self, line: Line) -> None:
        self.tell(plain(line, self._stretch))

    def tell(self, message: str) -> bool:
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
        return True

    def close(self) -> None:
        """Only now it is known which step was the last: a phase may end before its time."""
        self._tell_step()

    def _tell_step(self) -> None:
        line, self._untold = self._untold, None
        self._told = time.monotonic()
        if line is not None:
            self.tell(plain(line, self._stretch))


class Terminal:
    """One bar, from the first step on; evaluations and messages stay above it."""

    def __init__(self, stretch: Stretch) -> None:
        self._stretch = stretch
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        figures = TextColumn("{task.fields[figures]}", markup=False, table_column=Column())  # folds where it is narrow
        where = TextColumn("{task.description}", markup=False)
        # Drawn with each step, not by a thread: the workers of the loader are forked from this process. What others
        # print appears above the bar, but stdout stays where it is where that is no terminal.
        self._bar = Progress(
            where, BarColumn(20), figures,
            console=self._console, auto_refresh=False, redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self._task: TaskID | None = None

    def train(self, line: Line) -> None:
        where = f"{self._stretch.title} {line['step']}/{self._stretch.steps}"
        if self._task is None:
            self._start()
        if self._task is not None:
            self._bar.update(self._task, completed=line["step"], description=where, figures=_step(line), refresh=True)

    def evaluated(self, line: Line) -> None:
        self.tell(plain(line, self._stretch))

    def tell(self, message: str) -> bool:
        self._console.print(message, soft_wrap=True)
        return True

    def close(self) -> None:
        self._bar.stop()

    def _start(self) -> None:
        self._bar.start()
        self._console.show_cursor(True)  # rich hides it, and who is killed could not bring it back
        self._task = self._bar.add_task("", total=self._stretch.steps, figures="")
