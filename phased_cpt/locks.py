"""One run at a time in a folder: flock, which the kernel releases when its holder dies, however it dies.

run.lock     exclusive, held by the conductor
ranks.lock   shared, held by every rank, so that ranks which outlive their conductor keep a second run out
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from phased_cpt.errors import PhasedCptError, RunIsBusy
from phased_cpt.run_dir import RunDir

PATIENCE_SECONDS = 0.5  # `status` looks at the lock for an instant; that must not turn a starting run away


@contextlib.contextmanager
def run_lock(run_dir: RunDir) -> Iterator[None]:
    """Hold the folder as its only run, or say who does."""
    with _locked(run_dir.lock, fcntl.LOCK_EX) as file:
        if file is None:
            raise RunIsBusy(
                f"{run_dir.root}: another run is at work here ({_holder(run_dir.lock)}); wait for it, or stop it"
            )
        with _locked(run_dir.ranks_lock, fcntl.LOCK_EX) as ranks:
            if ranks is None:
                raise RunIsBusy(
                    f"{run_dir.root}: ranks of an earlier run are still alive; "
                    f"`fuser {run_dir.ranks_lock}` lists their process ids; end them first"
                )
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_myself()).encode(), 0)
        yield


@contextlib.contextmanager
def rank_lock(run_dir: RunDir) -> Iterator[None]:
    """Hold the folder as one rank of many."""
    with _locked(run_dir.ranks_lock, fcntl.LOCK_SH) as file:
        if file is None:
            raise RunIsBusy(f"{run_dir.root}: another run is just starting here")
        yield


def holder_of(run_dir: RunDir) -> str | None:
    """Who is at work in the folder, if anyone is."""
    if not run_dir.lock.exists():
        return None
    with _locked(run_dir.lock, fcntl.LOCK_SH, patience_seconds=0, create=False) as file:
        return _holder(run_dir.lock) if file is None else None


@contextlib.contextmanager
def _locked(
    path: Path, mode: int, patience_seconds: float = PATIENCE_SECONDS, create: bool = True
) -> Iterator[int | None]:
    """The locked file, or None where another process holds it. Children do not inherit the lock (O_CLOEXEC)."""
    flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY  # a reader needs no right to write
    file = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield file if _try(file, mode, patience_seconds, path) else None
    finally:
        os.close(file)


def _try(file: int, mode: int, patience_seconds: float, path: Path) -> bool:
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise PhasedCptError(f"{path}: this file system cannot lock files ({error.strerror})") from None
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)


def _myself() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its holder has not signed yet"
