"""Two ways into a run: a launcher starts a job of processes for each phase, or they are ranks already (ranks.py).

On several machines the first way is the same: node 0 conducts, and the others start the ranks that it orders.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from phased_cpt.config.schema import Launch
from phased_cpt.errors import InputError
from phased_cpt.job import Job
from phased_cpt.launchers import LAUNCHERS, Place, Program, gpus_here, launched, ranks_here
from phased_cpt.launchers.running import Part
from phased_cpt.nodes import Head, Host, attend, identity_of, read_hostfile
from phased_cpt.nodes.hosts import called, require_here
from phased_cpt.plan import Plan
from phased_cpt.stopping import Stopping, heard

WORKER = "phased_cpt.worker"

Tell = Callable[[str], None]


class Door(Protocol):
    """How a run trains a phase: through a launcher, or in the ranks that are there."""

    @property
    def ranks(self) -> int: ...

    @property
    def starts_again(self) -> bool:
        """Whether a phase that has failed can be started once more in the same call."""

    def train(self, job: Job, stop: Stopping) -> None: ...


@dataclass(frozen=True)
class LaunchedJobs:
    """The first door: a phase is a job of fresh processes."""

    launcher: str
    ranks: int
    hang_seconds: float
    head: Head | None = None  # of several nodes

    @property
    def starts_again(self) -> bool:
        return True

    @classmethod
    def of(cls, plan: Plan) -> "LaunchedJobs":
        """On this machine."""
        launch = plan.config.launch
        return cls(launch.launcher, ranks_of_this_node(launch), launch.hang_minutes * 60)

    def train(self, job: Job, stop: Stopping) -> None:
        self.run(Program(WORKER, job.path, job.path.parent / "logs"), stop)

    def run(self, program: Program, stop: Stopping, *, quiet: bool = False) -> None:
        """Any program in the place of the ranks, on every node; `quiet`: the first rank has a log, too."""
        if self.launcher not in LAUNCHERS:
            raise InputError(
                f"launch.launcher: {self.launcher} trains in the process that is called; use the command line"
            )
        elsewhere: list[Part] = []
        if self.head is None:
            place = Place.alone(self.ranks)
        else:
            self.head.require_all()
            place = self.head.place()
            elsewhere += self.head.parts(program, self.launcher, place)
        commands = LAUNCHERS[self.launcher](program, place)
        if quiet:
            commands = [replace(command, log=command.log or program.logs / "first.log") for command in commands]
        launched(commands, program.logs, stop, self.hang_seconds, elsewhere)


def ranks_of_this_node(launch: Launch) -> int:
    """What is asked for, if there are GPUs for it."""
    if gpus_here() and (launch.num_gpus or 1) > len(gpus_here()):
        what = f"launch.num_gpus is {launch.num_gpus}, and {len(gpus_here())} GPUs are visible here"
        raise InputError(f"{what}; lower it, or look at CUDA_VISIBLE_DEVICES")
    return ranks_here(launch.num_gpus)


# Several machines -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launched_jobs(
    plan: Plan, node: int | None, words: Sequence[str], tell: Tell, *, rehearses: bool = False
) -> Iterator[LaunchedJobs]:
    """On this machine; or on all of them, once they have come. `words`: what others are called with, by ssh."""
    launch = plan.config.launch
    hosts = _hosts(launch)
    _require_sense(launch, node, hosts)
    ranks = ranks_of_this_node(launch.model_copy(update={"num_gpus": hosts[0].slots}) if hosts else launch)
    nodes, hang_seconds = len(hosts) or launch.nnodes, launch.hang_minutes * 60
    if nodes == 1:
        yield LaunchedJobs(launch.launcher, ranks, hang_seconds)
        return
    address = launch.master_addr or hosts[0].name
    with contextlib.ExitStack() as leaving:
        stop = leaving.enter_context(heard())
        mine = identity_of(plan)
        head = Head(address, launch.master_port, nodes, ranks, mine, hang_seconds, rehearses=rehearses)
        place = ["--nnodes", str(nodes), "--master-addr", address, "--master-port", str(launch.master_port)]
        others = leaving.enter_context(called(hosts, [*words, *place])) if hosts else []
        leaving.enter_context(head)  # dismissed before those that ssh has called are waited for
        head.gather(stop, tell, lambda: next(filter(None, (each.ended() for each in others)), None))
        yield LaunchedJobs(launch.launcher, head.ranks, hang_seconds, head)


def require_sense(plan: Plan, node: int | None) -> None:
    """What is said of the machines, before anything else is looked at."""
    _require_sense(plan.config.launch, node, _hosts(plan.config.launch))


def is_other_node(plan: Plan, node: int | None) -> bool:
    """Whether another one conducts."""
    return plan.config.launch.nnodes > 1 and bool(node)


def attended_jobs(plan: Plan, node: int, tell: Tell, *, rehearses: bool = False) -> int:
    """As a node that is not the first: returns the exit code of node 0."""
    launch = plan.config.launch
    _require_sense(launch, node, [])
    assert launch.master_addr is not None
    ranks, mine = ranks_of_this_node(launch), identity_of(plan)
    where = launch.master_addr, launch.master_port
    return attend(*where, node, launch.nnodes, ranks, mine, tell, rehearses=rehearses)


def _hosts(launch: Launch) -> list[Host]:
    if launch.hostfile is None:
        return []
    path = Path(launch.hostfile)
    hosts = read_hostfile(path)
    require_here(hosts, path)
    return hosts


def _require_sense(launch: Launch, node: int | None, hosts: Sequence[Host]) -> None:
    """What was said of the machines fits together."""
    if launch.launcher == "inline" and (launch.nnodes > 1 or len(hosts) > 1):
        raise InputError("launch.launcher: inline is one process, and there are several nodes; take local")
    if hosts and (launch.nnodes > 1 or node is not None):
        raise InputError("launch.hostfile names the machines; leave --nnodes and --node-rank out")
    if launch.nnodes == 1:
        if node:
            raise InputError(f"--node-rank {node}: there is one node; add --nnodes N")
        return
    if launch.master_addr is None:
        raise InputError(f"--nnodes {launch.nnodes}: add --master-addr, the name or address of node 0")
    if node is None:
        raise InputError(f"--nnodes {launch.nnodes}: add --node-rank, 0 on {launch.master_addr} and 1, 2, … elsewhere")
    if not 0 <= node < launch.nnodes:
        raise InputError(f"--node-rank {node}: it goes from 0 to {launch.nnodes - 1}")
