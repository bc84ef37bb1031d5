"""The story of a run as text: every step, evaluation and message of all phases with its UTC time."""

import logging
import time
from logging.handlers import RotatingFileHandler

from phased_cpt.tracking.console import plain
from phased_cpt.tracking.sink import Line, Stretch

MAX_BYTES = 10 * 2**20
KEPT = 5


class TrainingLog:
    """logs/training.log under the run folder; training.log.1 … .5 are what it was before."""

    def __init__(self, stretch: Stretch) -> None:
        path = stretch.root / "logs" / "training.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stretch = stretch
        self._file = _Rotating(path, maxBytes=MAX_BYTES, backupCount=KEPT, encoding="utf-8")
        formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        self._file.setFormatter(formatter)
        how = f"goes on after step {stretch.begin}" if stretch.begin else "starts"
        self.tell(f"{stretch.title}: attempt {stretch.attempt} {how}")

    def train(self, line: Line) -> None:
        self.tell(plain(line, self._stretch))

    def evaluated(self, line: Line) -> None:
        self.tell(plain(line, self._stretch))

    def tell(self, message: str) -> bool:
        # A record of its own, past the loggers: what other libraries set there decides nothing here.
        self._file.handle(logging.LogRecord("phased_cpt", logging.INFO, "", 0, message, None, None))
        return True

    def close(self) -> None:
        self._file.close()


class _Rotating(RotatingFileHandler):
    """The standard one prints its failures and goes on; a full disk is to be told once."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        raise  # it is called from within an except clause
