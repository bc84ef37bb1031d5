"""What this machine has, asked without torch."""

import functools
import os
import shutil
import subprocess


@functools.cache
def _gpus_of_the_machine() -> tuple[int, ...]:
    """The memory of each GPU in bytes."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)  # noqa: S603
    sizes = [line.strip() for line in answer.stdout.splitlines()] if answer.returncode == 0 else []
    return tuple(int(size) * 2**20 for size in sizes if size.isdecimal())


def gpus_here() -> tuple[int, ...]:
    """The memory of each GPU that CUDA_VISIBLE_DEVICES leaves."""
    every, visible = _gpus_of_the_machine(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not every:
        return every
    named = [name.strip() for name in visible.split(",")]
    kept = named[: named.index("-1")] if "-1" in named else named
    return tuple(every[int(name)] if name.isdecimal() and int(name) < len(every) else every[0] for name in kept if name)


def ranks_here(asked: int | None) -> int:
    """How many processes a job has: what is asked for, else one for each GPU, else one."""
    return asked or len(gpus_here()) or 1
