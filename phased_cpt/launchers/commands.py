"""Commands and environment of the ranks of a job, for each way to start them."""

import base64
import gc
import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from phased_cpt.children import safe_path
from phased_cpt.launchers.machine import gpus_here, names_of_gpus
from phased_cpt.launchers.parents import die_with_the_parent

WORKER = "phased_cpt.worker"
SOON = (
    "import runpy; from phased_cpt.launchers import before_the_imports; before_the_imports(); "
    f"runpy.run_module('{WORKER}', run_name='__main__', alter_sys=True)"
)
Environment = dict[str, str]


@dataclass(frozen=True)
class Command:
    """One process to start; without a log it writes where its parent does."""

    name: str  # for messages
    words: list[str]
    environment: Environment = field(default_factory=dict)
    log: Path | None = None


Launcher = Callable[[Path, int], list[Command]]


def local(job: Path, ranks: int) -> list[Command]:
    """A process a rank, started directly: twice as fast as through a launcher, and every one of them is watched."""
    port = str(free_port())
    words = [sys.executable, "-c", SOON, str(job)]
    return [
        Command(
            f"rank {rank}",
            words,
            shared(ranks)
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            job.parent / "logs" / f"rank{rank}.log" if rank else None,
        )
        for rank in range(ranks)
    ]


def deepspeed(job: Path, ranks: int) -> list[Command]:
    """DeepSpeed's own launcher: the part of it that starts the ranks of one machine.

    `deepspeed --num_gpus=N` in front of it would take the first N GPUs, whatever CUDA_VISIBLE_DEVICES says.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": names_of_gpus(ranks)}).encode()).decode()
    words = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--master_port={free_port()}"]
    passed_on = ["--module", "--no_local_rank", "--quiet", WORKER, str(job)]
    return [Command("the deepspeed launcher", [*words, *passed_on], shared(ranks))]


def torchrun(job: Path, ranks: int) -> list[Command]:
    """PyTorch's launcher."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [Command("torchrun", [*words, "-m", WORKER, str(job)], shared(ranks))]


LAUNCHERS: dict[str, Launcher] = {"local": local, "deepspeed": deepspeed, "torchrun": torchrun}


def shared(ranks: int) -> Environment:
    """What every rank is told, however it is started."""
    here = str(Path(sys.executable).parent)  # where DeepSpeed finds ninja
    environment = {"PATH": f"{here}:{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1", **safe_path()}
    environment |= {
        "TORCH_CPP_LOG_LEVEL": "ERROR"
    }  # else thirty lines of C++ stack wherever a rank ends before another
    if not gpus_here():
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_of_a_rank(ranks)))}
    return environment


def threads_of_a_rank(ranks: int) -> int:
    """On a CPU, of so many ranks on this machine; ranks that take each other's cores wait for each other, spinning."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def before_the_imports() -> None:
    """What a process that is going to load torch does first."""
    if "RANK" in os.environ:
        die_with_the_parent()  # the imports take seconds, in which a launcher may go
    # The collector takes a quarter of the time of the imports, and finds nothing; train.engine.join turns it on again.
    gc.disable()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses a package that nothing needs


def free_port() -> int:
    """One that nobody listens on now; a fixed one is taken as soon as two runs share a machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
