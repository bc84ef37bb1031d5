"""The second door: these processes are ranks already. The first conducts the run, the others do as it says.

rank 0   plan ─ prepare ─ order: train ─ train ─ publish ─ order: train ─ … ─ order: leave
others   wait …………………………… train ───────────────── wait …… train ─ … ───────── leave

They wait by looking at a store, not in a collective: rank 0 may prepare data for hours, and nothing times out.
"""

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, destroy_process_group
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from phased_cpt.errors import Diverged, PhasedCptError
from phased_cpt.job import Job
from phased_cpt.launchers import free_port, shared
from phased_cpt.train.engine import Rank, die_with_the_parent, join, quiet
from phased_cpt.worker import train_phase

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 60.0  # until every rank has heard that it may leave


class Ranks:
    """These processes, as a door."""

    def __init__(self) -> None:
        if "RANK" in os.environ:
            die_with_the_parent()
        else:  # --launcher inline: this process is all there is
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.number, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        quiet()
        store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=30)))
        self._store = PrefixStore("phased_cpt", store)
        self._rank: Rank | None = None
        self._orders = 0

    def train(self, job: Job) -> None:
        """Order it, and do it."""
        self._order(train=job.text())
        train_phase(job, self._joined())

    def follow(self) -> int:
        """Do what rank 0 orders until it says to leave; returns the exit code."""
        while True:
            order = self._next_order()
            if "leave" in order:
                self._store.add("left", 1)
                self._part()
                return int(order["leave"])
            try:
                train_phase(Job.parse(order["train"]), self._joined())
            except Diverged as error:  # every rank has noticed, and the first one tells
                return error.exit_code
            except PhasedCptError as error:
                sys.stderr.write(f"rank {self.number}: {error}\n")
                return error.exit_code
            except Exception:
                traceback.print_exc()
                return 1

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """However it ends, the others hear of it."""
        code = 0 if error is None else getattr(error, "exit_code", 1)
        self._order(leave=code)
        if error is None:
            self._part()
        deadline = time.monotonic() + (PATIENCE_SECONDS if error is None else POLL_SECONDS)
        while self._store.add("left", 0) < self.ranks - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)  # the store goes with this process

    def _part(self) -> None:
        if self._rank is not None:
            destroy_process_group()

    def _joined(self) -> Rank:
        if self._rank is None:
            self._rank = join(self._store)
        return self._rank

    def _order(self, **order: Any) -> None:
        self._store.set(f"order-{self._orders}", json.dumps(order))
        self._orders += 1

    def _next_order(self) -> dict[str, Any]:
        key = f"order-{self._orders}"
        try:
            while not self._store.check([key]):
                time.sleep(POLL_SECONDS)
            self._orders += 1
            order: dict[str, Any] = json.loads(self._store.get(key))
            return order
        except (DistNetworkError, DistStoreError, ConnectionError) as error:
            raise PhasedCptError(f"rank {self.number}: rank 0 is gone ({error})") from None


def in_ranks() -> Ranks:
    """This process as a rank, with the environment that every rank has."""
    os.environ |= {
        name: value
        for name, value in shared(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))).items()
        if name != "OMP_NUM_THREADS"
    }
    return Ranks()
