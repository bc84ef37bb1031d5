"""What a phase may use: the GPUs or the host of this machine, or of one that is only spoken of."""

import contextlib
import functools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from phased_cpt.launchers import gpus_here

CONTEXT_BYTES = int(1.5e9)  # of CUDA, cuBLAS and NCCL, in each process
FRAGMENTED = 0.06  # of a GPU's memory, which the allocator holds and cannot give
INTERPRETER_BYTES = int(0.5e9)  # Python, torch and what stands on it, in each process, without a GPU
INTERPRETER_WITH_CUDA = int(2.5e9)  # the same with CUDA's libraries and pinned buffers
SYSTEM = 0.05  # of a host's memory, for everybody else
PATIENCE_SECONDS = 60.0  # with nvidia-smi


@dataclass(frozen=True)
class Hardware:
    """What a phase may use."""

    ranks: int
    nodes: int
    gpu_bytes: int | None  # of the smallest GPU; None without one
    host_bytes: int  # of one node

    @property
    def ranks_of_a_node(self) -> int:
        return -(-self.ranks // self.nodes)

    @property
    def room(self) -> int:
        """What a rank may use of its device: a GPU, or its share of the host."""
        if self.gpu_bytes is None:
            return self.host_room
        return max(0, int(self.gpu_bytes * (1 - FRAGMENTED)) - CONTEXT_BYTES)

    @property
    def host_room(self) -> int:
        """What a rank may use of the host."""
        own = INTERPRETER_BYTES if self.gpu_bytes is None else INTERPRETER_WITH_CUDA
        return max(0, int(self.host_bytes * (1 - SYSTEM)) // self.ranks_of_a_node - own)


def hardware_here(ranks: int, nodes: int = 1) -> Hardware:
    """This machine."""
    gpus = gpus_here()
    return Hardware(ranks, nodes, min(gpus) if gpus else None, host_memory())


def host_memory(root: Path = Path("/")) -> int:
    """Of this machine, or of the container that this is."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal")]
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": there is none
            found.append(int((root / limit).read_text()))
    return min(found)


@functools.cache
def name_of_gpu() -> str:
    """Of the first; nothing where nvidia-smi does not say."""
    program = shutil.which("nvidia-smi")
    command = [program or "", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)  # noqa: S603
        return next(iter(answer.stdout.splitlines()), "").strip() if answer.returncode == 0 else ""
    return ""
