"""Every file operation that a process does below a folder, counted; at the n-th the process is killed, or refused.

Python's audit hooks see what is opened for writing, renamed, linked, made and removed, by whatever library; each
write(2) of a file of Python, and pwrite, are wrapped. Reading and fsync change nothing that a SIGKILL could show: they
are not counted, and fsync is not even done, for it is what a short run mostly waits for.
"""

import builtins
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

PATHS = {  # the events; which of their arguments is the path that changes, and which the folder that it is seen from
    "os.rename": (1, 3), "os.link": (1, 3), "os.symlink": (1, 2), "os.mkdir": (0, 2), "os.remove": (0, 1),
    "os.rmdir": (0, 1), "os.truncate": (0, None),
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Kinds = Literal["files", "pulses"]  # a pulse is the sign of life that a rank gives in every stage of every step
Action = Literal["kill", "full once", "stays full", "list"]


class Counter:
    """Counts in this process, and acts at the n-th of the operations that it is to count."""

    def __init__(self, root: Path, at: int, action: Action, kinds: Kinds, word: Path) -> None:
        self._root, self._left, self._action, self._kinds, self._word = str(root), at, action, kinds, word
        self._process, self._is_busy = os.getpid(), False

    def start(self) -> None:
        sys.addaudithook(self._hear)
        for name in ("write", "pwrite"):
            setattr(os, name, self._counting(name, getattr(os, name)))
        builtins.open = io.open = self._opening(io.open)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & WRITING and not isinstance(arguments[0], int):
            self._meet("open", os.fsdecode(arguments[0]))
        elif event in PATHS:
            path = _path(*(arguments[at] if at is not None else -1 for at in PATHS[event]))
            if event != "os.mkdir" or not os.path.isdir(path):  # noqa: PTH112 - with the least that is called
                self._meet(event, path)

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(file: int, *arguments: Any) -> Any:
            self._meet(name, _path(file))
            return real(file, *arguments)

        return operation

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """As `open` does, over a file that counts what is really written, behind the buffer."""
        meet = self._meet

        class Counted(io.FileIO):
            def write(self, content: Any, /) -> int:
                meet("write", str(self.name))
                return super().write(content)

        def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **named: Any) -> Any:
            if isinstance(file, int) or "+" in mode or not set(mode) & set("wax") or buffering == 0:
                return real(file, mode, buffering, *text, **named)
            binary = io.BufferedWriter(Counted(file, mode.strip("bt")))
            named = {key: value for key, value in named.items() if key in ("encoding", "errors", "newline")}
            return binary if "b" in mode else io.TextIOWrapper(binary, *text[:3], **named)

        return opened

    def _meet(self, name: str, path: str) -> None:
        """One more operation, if it is one of ours."""
        if self._is_busy or os.getpid() != self._process or (name == "pwrite") != (self._kinds == "pulses"):
            return
        path = os.path.abspath(path)  # noqa: PTH100 - with the least that is called
        if not path.startswith(self._root) or ".py" in path:
            return
        self._is_busy = True
        try:
            self._count(name, path)
        finally:
            self._is_busy = False

    def _count(self, name: str, path: str) -> None:
        self._left -= 1
        stays_full = self._action == "stays full" and self._left < 0 and name in ("open", "write", "os.mkdir")
        if self._left != 0 and not stays_full and self._action != "list":
            return
        with io.FileIO(str(self._word), "a") as word:
            word.write(json.dumps([name, path.removeprefix(self._root)]).encode() + b"\n")
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._action != "list":
            raise OSError(errno.ENOSPC, "No space left on device", path)


def _path(where: Any, folder: int = -1) -> str:
    """Of a name, seen from an open folder perhaps, or of an open file."""
    if isinstance(where, int):
        return os.readlink(f"/proc/self/fd/{where}")  # noqa: PTH115 - with the least that is called
    return os.fsdecode(where) if folder < 0 else f"{_path(folder)}/{os.fsdecode(where)}"


def without_fsync() -> None:
    """What is written stays in the page cache, which survives any SIGKILL."""
    os.fsync = lambda fd: None


def act_at(at: int, root: Path, word: Path, *, action: Action = "kill", kinds: Kinds = "files") -> None:
    """From here on; what was done is told in `word`, a line an operation, which lies elsewhere."""
    without_fsync()
    Counter(root, at, action, kinds, word).start()
