"""One process as a rank: how it joins the others, keeps quiet, and leaves nothing behind for the next phase."""

import contextlib
import ctypes
import fcntl
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import transformers
from accelerate.state import AcceleratorState
from deepspeed.accelerator import get_accelerator
from torch import distributed
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import PrefixStore
from torch.utils import cpp_extension
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from phased_cpt.launchers import CONDUCTOR
from phased_cpt.train.arguments import A_WEEK

PR_SET_PDEATHSIG = 1
STALE_SECONDS = 120.0  # of the lock of a compiler that was killed; the only kernel that is built takes 15
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Rank:
    """This process among the others."""

    number: int
    of: int

    @property
    def first(self) -> bool:
        return self.number == 0


def join(store: Store | None = None) -> Rank:
    """Meet the other ranks: over NCCL on GPUs, over gloo on a CPU; `store` is where they have met already, if so."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend, patience = "nccl" if on_gpu else "gloo", timedelta(seconds=A_WEEK)
    if store is None:
        distributed.init_process_group(backend, timeout=patience)
    else:
        store = PrefixStore("ranks", store)
        distributed.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=ranks)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
        _build_kernel()
        deepspeed.init_distributed(backend, verbose=False)
    return Rank(rank, ranks)


def meet(rank: Rank) -> None:
    """Wait for the others."""
    if rank.of > 1:
        distributed.barrier()


def _build_kernel() -> None:
    """On a CPU DeepSpeed compiles a kernel at its first start: one process does, and a killed one holds nobody up."""
    if get_accelerator().device_name() != "cpu":
        return
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    with (folder / "phased_cpt.lock").open("a+") as file, contextlib.suppress(RuntimeError):  # no compiler: gloo alone
        fcntl.flock(file, fcntl.LOCK_EX)
        _take_stale_lock(folder / "lock", ours=bool(file.seek(0, os.SEEK_END)))
        file.write("building")
        file.flush()
        try:
            builder.load(verbose=False)
        finally:
            file.truncate(0)


def _take_stale_lock(lock: Path, ours: bool) -> None:
    """PyTorch waits until this file goes, and asks nobody whether its maker lives. One of ours does not: we hold its
    place now. Of another program we cannot know, so it gets the time that a build may take.
    """
    told = False
    while (age := _age(lock)) is not None:
        if ours or age > STALE_SECONDS:
            lock.unlink(missing_ok=True)
            return
        if not told:
            sys.stderr.write(f"waiting for another program that builds, {STALE_SECONDS:.0f} s at most: {lock}\n")
            told = True
        time.sleep(POLL_SECONDS)


def _age(path: Path) -> float | None:
    """Seconds since a file was written; None without one. A clock that was set back makes nothing young for ever."""
    with contextlib.suppress(FileNotFoundError):
        return abs(time.time() - path.stat().st_mtime)
    return None


def die_with_the_parent() -> None:
    """When the launcher is killed, or the conductor above it, its ranks end too: they would train on, unseen."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
    if conductor := os.environ.get(CONDUCTOR):
        _die_with(int(conductor))


def _die_with(process: int) -> None:
    """With one that is not the parent: a launcher stands between them. Or one that died before this could be asked."""
    try:
        file = os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # a kernel before 5.3
        return

    def wait() -> None:
        select.select([file], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="conductor", daemon=True).start()


def quiet() -> None:
    """What the libraries say of themselves does not help anybody; errors still come through."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft|transformers|deepspeed|accelerate")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("DeepSpeed", "deepspeed", "accelerate", "torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def device_memory(device: torch.device) -> str:
    """What is known of memory, for a message."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device)
        return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {peak / 2**30:.1f} GiB at most by this process"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        return f"{int(available) / 2**20:.1f} GiB of host memory available"
    return "nothing is known of its memory"


def tear_down(trainer: Trainer) -> None:
    """Engine, optimizer and partitions go; the process group stays for the next phase."""
    trainer.accelerator.free_memory()
    for name in (
        "model",
        "model_wrapped",
        "optimizer",
        "lr_scheduler",
        "deepspeed",
        "train_dataset",
        "callback_handler",
    ):
        setattr(trainer, name, None)


@contextlib.contextmanager
def swept() -> Iterator[None]:
    """After what is done in here, memory is as it was before."""
    try:
        yield
    finally:
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
