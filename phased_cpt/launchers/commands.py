"""Commands and environment of the ranks of a job, for each way to start them."""

import base64
import gc
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from phased_cpt.children import safe_path
from phased_cpt.launchers.machine import gpus_here, names_of_gpus
from phased_cpt.launchers.parents import die_with_the_parent
from phased_cpt.launchers.place import Place

SOON = "import runpy; from phased_cpt.launchers import before_the_imports; before_the_imports(); "
Environment = dict[str, str]


@dataclass(frozen=True)
class Program:
    """What every rank of a job runs."""

    module: str
    argument: Path  # the one word that it is called with
    logs: Path


@dataclass(frozen=True)
class Command:
    """One process to start; without a log it writes where its parent does."""

    name: str  # for messages
    words: list[str]
    environment: Environment = field(default_factory=dict)
    log: Path | None = None


Launcher = Callable[[Program, Place], list[Command]]


def local(program: Program, place: Place) -> list[Command]:
    """A process a rank, started directly: twice as fast as through a launcher, and every one of them is watched."""
    code = f"{SOON}runpy.run_module({program.module!r}, run_name='__main__', alter_sys=True)"
    words = [sys.executable, "-c", code, str(program.argument)]
    return [
        Command(
            f"rank {rank}",
            words,
            shared(place)
            | {"RANK": str(rank), "LOCAL_RANK": str(here)}
            | {"WORLD_SIZE": str(place.of), "LOCAL_SIZE": str(place.ranks)}
            | {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)},
            program.logs / f"rank{rank}.log" if rank else None,
        )
        for here, rank in enumerate(range(place.first, place.first + place.ranks))
    ]


def deepspeed(program: Program, place: Place) -> list[Command]:
    """DeepSpeed's own launcher: the part of it that starts the ranks of one machine.

    `deepspeed --num_gpus=N` in front of it would take the first N GPUs, whatever CUDA_VISIBLE_DEVICES says.
    """
    gpus = {f"node{node}": [str(gpu) for gpu in range(count)] for node, count in enumerate(place.counts)}
    gpus[f"node{place.node}"] = names_of_gpus(place.ranks)
    if len(place.counts) == 1:
        gpus = {"localhost": gpus["node0"]}
    world = base64.urlsafe_b64encode(json.dumps(gpus).encode()).decode()
    words = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={place.node}"]
    meeting = [f"--master_addr={place.address}", f"--master_port={place.port}"]
    passed_on = ["--module", "--no_local_rank", "--quiet", program.module, str(program.argument)]
    return [Command("the deepspeed launcher", [*words, *meeting, *passed_on], shared(place))]


def torchrun(program: Program, place: Place) -> list[Command]:
    """PyTorch's launcher."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={place.ranks}"]
    if len(place.counts) == 1:
        meeting = ["--standalone"]
    else:
        meeting = [f"--nnodes={len(place.counts)}", f"--node_rank={place.node}"]
        meeting += [f"--master_addr={place.address}", f"--master_port={place.port}"]
    return [Command("torchrun", [*words, *meeting, "-m", program.module, str(program.argument)], shared(place))]


LAUNCHERS: dict[str, Launcher] = {"local": local, "deepspeed": deepspeed, "torchrun": torchrun}


def shared(place: Place) -> Environment:
    """What every rank is told, however it is started."""
    here = str(Path(sys.executable).parent)  # where DeepSpeed finds ninja
    environment = {"PATH": f"{here}:{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1", **safe_path()}
    environment |= {
        "TORCH_CPP_LOG_LEVEL": "ERROR"
    }  # else thirty lines of C++ stack wherever a rank ends before another
    if place.interface and (len(place.counts) > 1 or not gpus_here()):
        environment |= {"GLOO_SOCKET_IFNAME": place.interface}  # on GPUs, too: ranks agree on numbers over it
    if not gpus_here():
        environment |= {"DS_ACCELERATOR": "cpu"}
        environment |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_of_a_rank(place.ranks)))}
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
