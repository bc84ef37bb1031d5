"""How far the measuring has come, on stderr: a bar on a terminal, a line now and then in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from phased_cpt.progress import LOG_SECONDS, Bar
from phased_cpt.tables.summary import clock


class Course:
    """Rows, questions and tasks, over all models."""

    def __init__(self) -> None:
        self.watcher = Bar()  # of data that is still to be prepared
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._model, self._total, self._done = "", 0, 0
        self._started = self._told = time.monotonic()

    def tell(self, message: str) -> None:
        self.pause()
        self.watcher.tell(message)

    def begin(self, total: int) -> None:
        self._total, self._started = total, time.monotonic()
        self._bar.add_task("", total=total)

    def at(self, model: str) -> None:
        self._model = model

    def advance(self, what: str, count: int) -> None:
        self._done += count
        if sys.stderr.isatty():
            self._bar.start()
            self._bar.update(self._bar.tasks[0].id, advance=count, description=f"{self._model}: {what}", refresh=True)
        elif time.monotonic() - self._told >= LOG_SECONDS:
            self._told = time.monotonic()
            left = (self._told - self._started) / self._done * (self._total - self._done)
            self.tell(f"{self._model}: {what}; {self._done} of {self._total}, {clock(left)} left")

    def pause(self) -> None:
        """Nothing is drawn, until there is more to be told; to be called at the end, too."""
        if self._bar.live.is_started:  # else, in a log, it would leave a blank line
            self._bar.stop()
