"""Commands and environment of the ranks of a job, for each way to start them."""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from phased_cpt.launchers.machine import gpus_here

WORKER = "phased_cpt.worker"
Environment = dict[str, str]


@dataclass(frozen=True)
class Command:
    """One process to start; without a log it writes where its parent does."""

    words: list[str]
    environment: Environment = field(default_factory=dict)
    log: Path | None = None


Launcher = Callable[[Path, int], list[Command]]


def local(job: Path, ranks: int) -> list[Command]:
    """A process a rank, started directly: twice as fast as through a launcher, and every one of them is watched."""
    port = str(free_port())
    words = [sys.executable, "-m", WORKER, str(job)]
    return [
        Command(
            words,
            shared(ranks)
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            job.parent / "logs" / f"rank{rank}.log" if rank else None,
        )
        for rank in range(ranks)
    ]


def deepspeed(job: Path, ranks: int) -> list[Command]:
    """DeepSpeed's own launcher."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}", f"--master_port={free_port()}"]
    return [Command([*words, "--module", WORKER, str(job)], shared(ranks))]


def torchrun(job: Path, ranks: int) -> list[Command]:
    """PyTorch's launcher."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [Command([*words, "-m", WORKER, str(job)], shared(ranks))]


LAUNCHERS: dict[str, Launcher] = {"local": local, "deepspeed": deepspeed, "torchrun": torchrun}


def shared(ranks: int) -> Environment:
    """What every rank is told, however it is started."""
    here = str(Path(sys.executable).parent)  # where DeepSpeed finds ninja
    environment = {"PATH": f"{here}:{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1"}
    if not gpus_here():
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return environment


def free_port() -> int:
    """One that nobody listens on now; a fixed one is taken as soon as two runs share a machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
