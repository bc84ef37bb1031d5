"""A rank and those above it: when they are gone it does not train on, unseen.

first door    conductor ─ (launcher) ─ rank     killed with either of them
second door   (guard) ─ deepspeed ─ launch.py ─ rank     stops when one of them dies: this step, a checkpoint, the end
"""

import ctypes
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path

from phased_cpt.launchers.processes import parent_of, words_of

CONDUCTOR = "PHASED_CPT_CONDUCTOR"  # in the environment of every rank, however deep below: whose end is its end
GUARD = "PHASED_CPT_GUARD"  # the same of launch/bin/deepspeed, as host:process, for srun carries it to other hosts
LAUNCH = "deepspeed.launcher.launch"
PR_SET_PDEATHSIG = 1
ORPHAN_SECONDS = 600.0  # for a step and a checkpoint; whoever has not stopped by then never will

_done_in = 0  # which process; a forked one has neither the signal nor the thread


def die_with_the_parent() -> None:
    """Before torch is imported or after it, or both: to be asked again changes nothing."""
    global _done_in
    if _done_in == os.getpid():
        return
    _done_in = os.getpid()
    if conductor := os.environ.get(CONDUCTOR):
        _with_the_parent(signal.SIGKILL)
        _die_with(int(conductor))
    else:
        _stop_with_all_of(_with_the_parent(signal.SIGTERM))


def guard_mark() -> str:
    """What a guard writes into the environment."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _with_the_parent(how: signal.Signals) -> int:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
    return parent


def _die_with(conductor: int) -> None:
    """It is not the parent: a launcher stands between them. Or it died before this could be asked."""
    if (file := _watched(conductor)) is None:
        return

    def wait() -> None:
        select.select([file], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="conductor", daemon=True).start()


def _stop_with_all_of(parent: int) -> None:
    """The first that dies asks for the stop, once: a second signal would be taken for impatience."""
    launcher = _watched(parent)
    others = [_watched(each) for each in (_deepspeed_above(parent), _guard()) if each is not None]
    files = [file for file in (launcher, *others) if file is not None]

    def wait() -> None:
        gone, _, _ = select.select(files, [], [])
        if launcher not in gone:  # of its parent the kernel itself has told this process
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    if files:
        threading.Thread(target=wait, name="launcher", daemon=True).start()


def _watched(process: int) -> int | None:
    """What can be read from when it ends; nobody stays whose launcher is gone already."""
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # a kernel before 5.3
        return None


def _guard() -> int | None:
    host, _, process = os.environ.get(GUARD, "").rpartition(":")
    return int(process) if host == socket.gethostname() else None


def _deepspeed_above(parent: int) -> int | None:
    """The command line program over launch.py: signals end it and nobody else. Never a shell, whose end is no wish."""
    above = parent_of(parent)
    program, *words = [*words_of(above), ""]
    is_deepspeed = any(Path(word).name == "deepspeed" or word == "deepspeed.launcher.runner" for word in words[:3])
    is_python = Path(program).name.startswith("python")
    return above if LAUNCH in words_of(parent) and is_python and is_deepspeed else None
