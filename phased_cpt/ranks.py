"""The second door: these processes are ranks already. The first conducts the run, the others do as it says.

rank 0   plan ─ prepare ─ order: train ─ train ─ publish ─ order: train ─ … ─ order: leave
others   wait …………………………… train ───────────────── wait …… train ─ … ───────── leave

They wait by looking at a store, not in a collective: rank 0 may prepare data for hours, and nothing times out.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch._C._distributed_c10d import Store
from torch.distributed import DistNetworkError, DistStoreError, destroy_process_group
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from phased_cpt.config.secrets import scrubbed
from phased_cpt.errors import InputError, Interrupted, PhasedCptError
from phased_cpt.job import Job
from phased_cpt.launchers import free_port, gpus_here, place_of_ranks, shared, threads_of_a_rank
from phased_cpt.launchers.parents import die_with_the_parent
from phased_cpt.model.quiet import quiet
from phased_cpt.nodes import Identity, differences, identity_of
from phased_cpt.plan import Plan
from phased_cpt.stopping import Asked, Stopping, heard
from phased_cpt.train.engine import Rank, join, meet
from phased_cpt.worker import train_phase

GONE = (DistNetworkError, DistStoreError, ConnectionError)  # what a store without its keeper answers
FAILED, STOPPED = "failed alone", "stopped alone"  # how many of the others
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 60.0  # until every rank has heard that it may leave
TELLING_SECONDS = 1.0  # for rank 0, which has a message and an exit code
FAILED_SECONDS = 3.0  # the same where something has failed, and the launcher is about to end them all


class Ranks:
    """These processes, as a door."""

    def __init__(self) -> None:
        if "RANK" in os.environ:
            die_with_the_parent()
        else:  # --launcher inline: this process is all there is
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.number, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.starts_again = self.ranks == 1  # of several, the others would still wait in what has failed
        quiet()
        self._store = PrefixStore("phased_cpt", _met(self.number))
        self._rank: Rank | None = None
        self._orders = 0
        self.typed: Plan | None = None  # as the others read it, too: a job may be of a plan that a gate has amended

    def train(self, job: Job, stop: Stopping) -> None:
        """Order it, and do it; what is asked of this process is heard on the way."""
        self._order(train=job.text(), identity=identity_of(self.typed or job.plan()).facts())
        try:
            self._train(job)
        except PhasedCptError:
            raise
        except Exception as error:
            if self._store.add(FAILED, 0):
                raise PhasedCptError("another rank has failed; what it says stands above") from error
            if self._store.add(STOPPED, 0):
                raise Interrupted("another rank was stopped; the same command goes on") from error
            raise

    def follow(self, read: Callable[[], Plan]) -> int:
        """Do what rank 0 orders until it says to leave; returns the exit code. `read`: what was typed here."""
        try:
            with heard() as stop:
                return self._follow(stop, read)
        except PhasedCptError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code

    def _follow(self, stop: Stopping, read: Callable[[], Plan]) -> int:
        while "leave" not in (order := self._next_order()):
            try:
                if self._orders == 1:
                    self._require_alike(Identity(**order["identity"]), read)
                self._train(Job.parse(order["train"]))
            except Asked:
                return self._failed(stop.as_failure())
            except Exception as error:
                return self._failed(error)
        return self._leave(order)

    def _require_alike(self, first: Identity, read: Callable[[], Plan]) -> None:
        """Ranks of other code or another configuration would train something else than rank 0 records."""
        if found := differences(first, identity_of(read())):
            what = "\n    ".join(found)
            raise InputError(f"this rank would not do the same as rank 0:\n    {what}\nmake them equal on all nodes")

    def _train(self, job: Job) -> None:
        if self._rank is None:
            self._rank = join(self._store)
        train_phase(job, self._rank)
        meet(self._rank)  # nobody holds the folder any more when the next phase is begun

    def _failed(self, error: Exception) -> int:
        """Rank 0 tells what befell all of them; what befell this one alone is told here."""
        try:
            return self._leave(self._next_order(FAILED_SECONDS))
        except TimeoutError:
            pass
        except PhasedCptError:  # rank 0 is gone, and that is why; but for what this one knows better
            if not isinstance(error, PhasedCptError):
                raise
        with contextlib.suppress(*GONE):
            self._store.add(STOPPED if isinstance(error, Interrupted) else FAILED, 1)
        if isinstance(error, PhasedCptError):
            sys.stderr.write(scrubbed(f"rank {self.number}: {error}\n"))
            return error.exit_code
        sys.stderr.write(scrubbed(f"rank {self.number}:\n{''.join(traceback.format_exception(error))}"))
        return 1

    def _leave(self, order: dict[str, Any]) -> int:
        """After a failure behind rank 0, which has to tell: a launcher ends everybody with the first that goes."""
        self._store.add("left", 1)
        code = int(order["leave"])
        if code:
            time.sleep(TELLING_SECONDS)
        elif self._rank is not None:
            destroy_process_group()
        return code

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """However it ends, the others hear of it."""
        with contextlib.suppress(*GONE):  # torchrun keeps the store, and may have been killed
            self._order(leave=0 if error is None else getattr(error, "exit_code", 1))
            if self._rank is not None and error is None:
                destroy_process_group()
            deadline = time.monotonic() + (PATIENCE_SECONDS if error is None else FAILED_SECONDS)
            while self._store.add("left", 0) < self.ranks - 1 and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)  # the store goes with this process

    def _order(self, **order: Any) -> None:
        self._store.set(f"order-{self._orders}", json.dumps(order))
        self._orders += 1

    def _next_order(self, patience: float = float("inf")) -> dict[str, Any]:
        key, deadline = f"order-{self._orders}", time.monotonic() + patience
        try:
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(POLL_SECONDS)
            self._orders += 1
            order: dict[str, Any] = json.loads(self._store.get(key))
            return order
        except GONE as error:
            raise PhasedCptError(f"rank {self.number}: rank 0 is gone ({error})") from None


def _met(rank: int) -> Store:
    """The store of all ranks, which rank 0 keeps."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store: Store = next(rendezvous("env://", timeout=timedelta(minutes=30)))[0]
    except GONE as error:
        if "EADDRINUSE" in str(error):
            mend = "give the launcher another: deepspeed --master_port=29600, torchrun --master-port=29600"
            raise InputError(f"{where} is taken by another program, perhaps another run; {mend}") from None
        reason = str(error).splitlines()[0]
        raise PhasedCptError(f"rank {rank} cannot reach rank 0 at {where}: {reason}") from None
    return store


def in_ranks() -> Ranks:
    """This process as a rank, with the environment that every rank has."""
    place = place_of_ranks(os.environ)
    if not gpus_here() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_of_a_rank(place.ranks))  # torch is loaded, and looks at the environment no more
    os.environ |= shared(place)
    return Ranks()
