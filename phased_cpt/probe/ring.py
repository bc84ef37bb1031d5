"""A rank that only talks: it meets the others, and sums up numbers with them for about two seconds.

python -m phased_cpt.probe.ring <folder>/job.json       as a rank, by whatever launcher ─→ <folder>/heard.json
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed

from phased_cpt.launchers.parents import die_with_the_parent
from phased_cpt.run_dir import publish_file

MEETING_SECONDS = 90.0  # the imports of the slowest rank, too
LIMIT_SECONDS = 120.0  # for all of it
TALKING_SECONDS = 1.5
NUMBERS = {"nccl": 2**24, "gloo": 2**20}  # of four bytes each; a gradient bucket's size, and a CPU's share of it
TRIES = 3


def talked() -> dict[str, Any]:
    """What the sum was, who took part, and how fast it went: bytes that each rank sends and receives in a ring."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=timedelta(seconds=MEETING_SECONDS))
    numbers = torch.full((NUMBERS[backend],), float(rank + 1), device=device)
    distributed.all_reduce(numbers)
    _require(float(numbers[-1]), ranks * (ranks + 1) / 2)
    rounds = _agreed(numbers, device)
    seconds = _rounds(numbers, rounds)
    hosts: list[Any] = [None] * ranks
    distributed.all_gather_object(hosts, socket.gethostname())
    moved = 2 * (ranks - 1) / ranks * numbers.numel() * numbers.element_size() * rounds
    return {"ranks": ranks, "hosts": hosts, "backend": backend, "bytes_per_second": moved / seconds}


def _require(found: float, right: float) -> None:
    if found != right:
        raise RuntimeError(f"the sum over all ranks is {found:g}, and {right:g} would be right")


def _agreed(numbers: torch.Tensor, device: torch.device) -> int:
    """How many rounds fill the time: the same number on every rank, or they would wait for each other."""
    seconds = torch.tensor([_rounds(numbers, TRIES)], device=device)
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    return max(1, int(TALKING_SECONDS * TRIES / float(seconds)))


def _rounds(numbers: torch.Tensor, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        distributed.all_reduce(numbers)
        numbers.zero_()  # sums of sums leave the numbers
    if numbers.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main(arguments: list[str]) -> NoReturn:
    """As a rank: leave an answer, or word of what has failed."""
    die_with_the_parent()
    folder, rank = Path(arguments[0]).parent, int(os.environ["RANK"])
    limit = threading.Timer(LIMIT_SECONDS, _given_up, (folder, rank))
    limit.daemon = True
    limit.start()
    try:
        answer = talked()
    except Exception as error:
        _left(folder, rank, f"the ranks do not reach each other: {' '.join(str(error).split())[:300]}")
        os._exit(1)
    if rank == 0:
        publish_file(folder / "heard.json", json.dumps(answer).encode())
    with contextlib.suppress(Exception):  # rank 0 keeps the store of all, and may be gone before they have heard it
        distributed.barrier()
    os._exit(0)  # the libraries take seconds to leave


def _given_up(folder: Path, rank: int) -> None:
    """In a thread: a collective that hangs is in the hands of a library."""
    _left(folder, rank, f"rank {rank} has not heard of the others for {LIMIT_SECONDS:.0f} s")
    os._exit(1)


def _left(folder: Path, rank: int, message: str) -> None:
    """As ranks of training do it: whoever has started them tells it."""
    mend = "look at the firewall, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (NCCL_DEBUG=INFO tells more)"
    word = {"exit_code": 1, "message": f"{message}; {mend}", "rank": rank, "unexpected": False}
    (folder / "logs").mkdir(exist_ok=True)
    publish_file(folder / "logs" / f"failed-{rank}.json", json.dumps(word).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
