"""What nvidia-smi says of each GPU that this call may use, and of whoever is at work on it."""

import shutil
import subprocess
from dataclasses import dataclass

from phased_cpt.launchers import gpus_here
from phased_cpt.launchers.machine import PATIENCE_SECONDS, names_of_gpus

_GPU = "index,uuid,name,driver_version,memory.total,memory.free"
_WORK = "gpu_uuid,pid,process_name,used_memory"
MIB = 2**20


@dataclass(frozen=True)
class Work:
    """A process that holds memory of a GPU."""

    pid: str
    name: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.pid}) holds {self.bytes / 1e9:.1f} GB"


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: str
    name: str
    driver: str
    total: int  # bytes; 0 where it does not say
    free: int
    at_work: tuple[Work, ...]


def gpus_of_this_call() -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves; none without nvidia-smi."""
    visible = gpus_here()
    if not visible:
        return ()
    at_work = _asked(f"--query-compute-apps={_WORK}")
    rows = [row for row in _asked(f"--query-gpu={_GPU}") if len(row) == len(_GPU.split(","))]
    named = [next((row for row in rows if _is(name, row)), None) for name in names_of_gpus(len(visible))]
    return tuple(_gpu(row, at_work) for row in named if row is not None)


def _gpu(row: list[str], at_work: list[list[str]]) -> Gpu:
    index, uuid, name, driver, total, free = row
    works = (Work(each[1], each[2], _bytes(each[3])) for each in at_work if each[0] == uuid and len(each) == 4)
    return Gpu(index, name, driver, _bytes(total), _bytes(free), tuple(works))


def _is(name: str, row: list[str]) -> bool:
    """CUDA knows a GPU by its number, or by the beginning of its UUID."""
    return row[0] == name if name.isdecimal() else row[1].startswith(name)


def _bytes(mebibytes: str) -> int:
    return int(mebibytes) * MIB if mebibytes.isdecimal() else 0


def _asked(query: str) -> list[list[str]]:
    """The rows of an answer; none, where it is refused."""
    program = shutil.which("nvidia-smi") or "nvidia-smi"
    command = [program, query, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)  # noqa: S603
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    return [[word.strip() for word in line.split(",")] for line in lines if line.strip()]
