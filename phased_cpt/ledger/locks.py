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
from uuid import uuid4

from phased_cpt.errors import PhasedCptError, RunIsBusy
from phased_cpt.run_dir import RunDir

PATIENCE_SECONDS = 0.5  # `status` looks at the lock for an instant; that must not turn a starting run away


@contextlib.contextmanager
def run_lock(run_dir: RunDir) -> Iterator[str]:
    """Hold the folder as its only run, or say who does. Yields the signature that this run's ranks must show."""
    run_dir.root.mkdir(parents=True, exist_ok=True)
    with _locked(run_dir.lock, fcntl.LOCK_EX) as file:
        if file is None:
            who = _holder(run_dir.lock)
            raise RunIsBusy(f"{run_dir.root}: another run is at work here ({who}); wait for it, or stop it")
        signature = json.dumps(_myself())
        os.ftruncate(file, 0)
        os.pwrite(file, signature.encode(), 0)
        # Signed first, then looked for ranks: one that joins meanwhile sees the signature, or is seen here.
        require_no_ranks(run_dir)
        yield signature


def require_no_ranks(run_dir: RunDir) -> None:
    """Before ranks are launched: those of an earlier job, of this run or another, must be gone."""
    with _locked(run_dir.ranks_lock, fcntl.LOCK_EX) as ranks:
        if ranks is None:
            mend = f"`fuser {run_dir.ranks_lock}` lists their process ids; end them first"
            raise RunIsBusy(f"{run_dir.root}: ranks of an earlier job are still alive; {mend}")


@contextlib.contextmanager
def rank_lock(run_dir: RunDir, signature: str) -> Iterator[None]:
    """Hold the folder as one rank of the run that signed it; a rank that comes late to a dead run is turned away."""
    with _locked(run_dir.ranks_lock, fcntl.LOCK_SH) as file:
        if file is None or run_dir.lock.read_text() != signature:
            raise RunIsBusy(f"{run_dir.root}: this rank belongs to an earlier run; another one has begun here since")
        yield


def holder_of(run_dir: RunDir) -> str | None:
    """Who is at work in the folder, if anyone is (or can be seen to be)."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        # The conductor's exclusive lock refuses a shared one, the ranks' shared locks refuse an exclusive one; that
        # one waits, because two who look at once would refuse each other.
        if _is_held(run_dir.lock, fcntl.LOCK_SH, patience_seconds=0):
            return _holder(run_dir.lock)
        if _is_held(run_dir.ranks_lock, fcntl.LOCK_EX, PATIENCE_SECONDS):
            return "ranks that outlived their run"
    return None


def _is_held(path: Path, mode: int, patience_seconds: float) -> bool:
    """Look, for an instant, with no right to write."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not _try(file, mode, patience_seconds, path)
    finally:
        os.close(file)


@contextlib.contextmanager
def _locked(path: Path, mode: int) -> Iterator[int | None]:
    """The locked file, or None where another process holds it. Programs that are started do not inherit it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield file if _try(file, mode, PATIENCE_SECONDS, path) else None
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may still have the file open
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
    """Who signs; the token tells two runs of one process within a second apart."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "token": uuid4().hex}


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
        if holder["host"] != socket.gethostname() or Path(f"/proc/{holder['pid']}").exists():
            return who
        # NFS keeps the lock of a machine that was restarted until its server notices.
        return f"{who}, which is gone, and the file system holds its lock still: delete {path} if nobody else is there"
    except (OSError, ValueError, KeyError, TypeError):
        return "its holder has not signed yet"
