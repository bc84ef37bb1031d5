"""Two ways into a run: a launcher starts a job of processes for each phase, or they are ranks already (ranks.py)."""

from dataclasses import dataclass
from typing import Protocol

from phased_cpt.errors import InputError
from phased_cpt.job import Job
from phased_cpt.launchers import LAUNCHERS, gpus_here, launched, ranks_here
from phased_cpt.plan import Plan
from phased_cpt.stopping import Stopping


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

    @property
    def starts_again(self) -> bool:
        return True

    @classmethod
    def of(cls, plan: Plan) -> "LaunchedJobs":
        launch = plan.config.launch
        if gpus_here() and (launch.num_gpus or 1) > len(gpus_here()):
            what = f"launch.num_gpus is {launch.num_gpus}, and {len(gpus_here())} GPUs are visible here"
            raise InputError(f"{what}; lower it, or look at CUDA_VISIBLE_DEVICES")
        return cls(launch.launcher, ranks_here(launch.num_gpus), launch.hang_minutes * 60)

    def train(self, job: Job, stop: Stopping) -> None:
        if self.launcher not in LAUNCHERS:
            raise InputError(
                f"launch.launcher: {self.launcher} trains in the process that is called; use the command line"
            )
        launched(LAUNCHERS[self.launcher](job.path, self.ranks), job.path.parent / "logs", stop, self.hang_seconds)
