"""Who is told how far the preparation has come, and what the user should know."""

import sys
from typing import Protocol


class Watcher(Protocol):
    """Who is told how far it has come."""

    def begin(self, what: str, total_bytes: int) -> None:
        """A source is about to be tokenised."""

    def advance(self, count: int) -> None:
        """So many bytes of it more."""

    def end(self) -> None:
        """It is done, or was there already."""

    def tell(self, message: str) -> None:
        """Something that the user should know."""


class Unwatched:
    """Nobody looks on; what the user should know still goes to stderr."""

    def begin(self, what: str, total_bytes: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def end(self) -> None:
        pass

    def tell(self, message: str) -> None:
        sys.stderr.write(f"{message}\n")
