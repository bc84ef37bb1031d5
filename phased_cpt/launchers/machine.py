"""What this machine has, asked without torch."""

import functools
import os
import shutil
import subprocess

from phased_cpt.errors import PhasedCptError

PATIENCE_SECONDS = 60.0  # of a sick GPU nvidia-smi never says anything


@functools.cache
def _gpus_of_the_machine() -> tuple[int, ...]:
    """The memory of each GPU in bytes; 0 where nvidia-smi does not know it, as where it is the host's own."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired:
        mend = "a GPU may be broken; `nvidia-smi` must answer before anything can be trained"
        raise PhasedCptError(f"{program} has not answered for {PATIENCE_SECONDS:.0f} s: {mend}") from None
    sizes = [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []
    return tuple(int(size) * 2**20 if size.isdecimal() else 0 for size in sizes)


def gpus_here() -> tuple[int, ...]:
    """The memory of each GPU that CUDA_VISIBLE_DEVICES leaves."""
    every = _gpus_of_the_machine()
    named = _visible(every)
    if named is None:
        return every
    return tuple(every[int(name)] if name.isdecimal() else min(every) for name in named)


def names_of_gpus(ranks: int) -> list[str]:
    """What CUDA is to see, a GPU for each rank; on a CPU just numbers."""
    named = _visible(_gpus_of_the_machine()) or ()
    return list(named[:ranks]) if len(named) >= ranks else [str(rank) for rank in range(ranks)]


def _visible(every: tuple[int, ...]) -> tuple[str, ...] | None:
    """CUDA_VISIBLE_DEVICES as CUDA reads it: up to the first name that is none, and nothing where one comes twice."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is None or not every:
        return None
    kept: list[str] = []
    for name in (part.strip() for part in said.split(",")):
        known = int(name) < len(every) if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
        if not known:
            break
        if name in kept:
            return ()
        kept.append(name)
    return tuple(kept)


def ranks_here(asked: int | None) -> int:
    """How many processes a job has: what is asked for, else one for each GPU, else one."""
    return asked or len(gpus_here()) or 1
