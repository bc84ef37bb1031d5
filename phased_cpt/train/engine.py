"""One process as a rank: how it joins the others, and leaves nothing behind for the next phase."""

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from accelerate.state import AcceleratorState
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import distributed
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import PrefixStore
from torch.utils import cpp_extension
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from phased_cpt.launchers.parents import die_with_the_parent as die_with_the_parent
from phased_cpt.train.arguments import A_WEEK

STALE_SECONDS = 600.0  # of the lock of a compiler that was killed; the slowest kernel takes two minutes


@dataclass(frozen=True)
class Rank:
    """This process among the others."""

    number: int
    of: int
    aside: distributed.ProcessGroup | None = None  # to agree on numbers of the CPU, where the GPUs are not waited for

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
    gc.freeze()  # what is imported stays: half a million objects, through which each collection went for half a second
    gc.enable()
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
        _without_shared_memory()
        take_stale_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()))
        deepspeed.init_distributed(backend, verbose=False)
    return Rank(rank, ranks, distributed.new_group(backend="gloo", timeout=patience) if on_gpu else None)


def meet(rank: Rank) -> None:
    """Wait for the others."""
    if rank.of > 1:
        distributed.barrier()


def agreed(rank: Rank, number: int) -> int:
    """The greatest of what the ranks say: a tenth of a millisecond. Collective."""
    if rank.of == 1:
        return number
    greatest = torch.tensor([number])
    distributed.all_reduce(greatest, distributed.ReduceOp.MAX, group=rank.aside)
    return int(greatest)


def _without_shared_memory() -> None:
    """On a CPU DeepSpeed compiles an all-reduce that only its tensor parallelism uses. Each of its jobs leaves 66 MB a
    rank in /dev/shm for good, which fills it up, and containers give it 64; and it needs a compiler.
    """
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def take_stale_locks(kernels: Path) -> None:
    """What DeepSpeed compiles at its first use (as the optimizer of an offload) is locked by a file for which PyTorch
    waits for ever, whether its maker still lives or not.
    """
    for lock in kernels.glob("**/lock"):
        with contextlib.suppress(OSError):
            age = abs(time.time() - lock.stat().st_mtime)
            if age > STALE_SECONDS:
                lock.unlink()
            else:
                sys.stderr.write(f"{lock} is {age:.0f} s old: if nothing is being compiled any more, delete it\n")


def memory_bytes(device: torch.device) -> int:
    """For the log: the most that this process has held of its GPU; without one, what it holds of the host now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
    _forget_models()
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


def _forget_models() -> None:
    """DeepSpeed's ZeRO-3 keeps every model that it has ever had, and with it the engine: in a stack, and in a cache."""
    parameter_offload.FWD_MODULE_STACK.clear()
    for function in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(function, "__closure__", None) or ():  # an lru_cache, with the model in its keys
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


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
