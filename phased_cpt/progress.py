"""How far the preparation of data has come, on stderr: a bar on a terminal, a line now and then in a log."""

import contextlib
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LOG_SECONDS = 10.0


class Bar:
    """A bar a source, with MB/s and what is left; sources that were there already show none."""

    def __init__(self) -> None:
        # Drawn when a piece is done, not by a thread: the workers are forked from this process.
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False, transient=True)
        self._source: tuple[str, int] = ("", 0)
        self._done, self._told, self._started = 0, 0.0, 0.0

    def begin(self, what: str, total_bytes: int) -> None:
        self._source, self._done = (what, total_bytes), 0
        self._started = self._told = time.monotonic()

    def advance(self, count: int) -> None:
        what, total = self._source
        self._done += count
        if not sys.stderr.isatty():
            if time.monotonic() - self._told >= LOG_SECONDS:
                self._log(what, total)
            return
        if not self._bar.tasks:
            self._bar.start()
            self._bar.add_task(what, total=total)
            self._bar.tasks[0].start_time = self._started
        self._bar.update(self._bar.tasks[0].id, completed=self._done, refresh=True)

    def end(self) -> None:
        if self._bar.tasks:
            self._bar.stop()
            self._bar.remove_task(self._bar.tasks[0].id)

    def tell(self, message: str) -> None:
        with contextlib.suppress(OSError):  # whoever read it may be gone: `… | tee log`
            sys.stderr.write(f"{message}\n")

    def _log(self, what: str, total: int) -> None:
        self._told = time.monotonic()
        speed = self._done / (self._told - self._started)
        left = (total - self._done) / speed
        self.tell(
            f"{what}: {self._done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {speed / 1e6:.0f} MB/s, {left:.0f} s left"
        )
