"""What the checks look at: a plan, this machine, and whatever takes time to find, each made once.

plan ─┬─ run folder · sources · tokenizer · base ─→ vocabulary ─→ prepared ─→ counted
      └─ ranks · gpus ─→ files ─→ fit, disk, times        the probe: what torch says
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from phased_cpt import fitting
from phased_cpt.bases import Base
from phased_cpt.config import Loaded
from phased_cpt.data.prepare import cache_folder, prepare
from phased_cpt.data.prepared import PreparedRun
from phased_cpt.data.tokenizer import Tokenizer, load_tokenizer
from phased_cpt.data.watch import Watcher
from phased_cpt.doors import LaunchedJobs
from phased_cpt.launchers import ranks_here
from phased_cpt.ledger import choose_run_dir
from phased_cpt.nodes.hosts import read_hostfile
from phased_cpt.plan import Plan, make_plan
from phased_cpt.preflight.child import asked
from phased_cpt.preflight.gpus import Gpu, gpus_of_this_call
from phased_cpt.preflight.hub import base_of
from phased_cpt.preflight.sources import found_sources
from phased_cpt.run_dir import RunDir

Made = TypeVar("Made")
Content = dict[str, Any]


class Skipped(Exception):  # noqa: N818 - nothing has failed here
    """What this check stands on is missing; another check says why."""


class Ground(Generic[Made]):
    """Something that several checks stand on. Its failure is told by one of them, and the others are skipped."""

    def __init__(self, what: str, make: Callable[[], Made]) -> None:
        self.what, self._make = what, make

    @cached_property
    def _outcome(self) -> tuple[Made | None, Exception | None]:
        try:
            return self._make(), None
        except Exception as error:
            return None, error

    def made(self) -> Made:
        """For the check that tells why, where it cannot be made."""
        made, error = self._outcome
        if error is not None:
            raise error
        return made  # type: ignore[return-value] # None is what some grounds are made of

    def given(self) -> Made:
        """For the checks that stand on it."""
        if self.missing:
            raise Skipped(f"skipped, because {self.what} is missing")
        return self.made()

    @property
    def missing(self) -> bool:
        """Whatever the reason."""
        return self._outcome[1] is not None

    @property
    def failed(self) -> bool:
        """Made in vain, and not for want of another ground."""
        return not isinstance(self._outcome[1], Skipped | None)


class Scene:
    """Everything that can be looked at; nothing is made before a check asks for it."""

    def __init__(
        self, plan: Plan, watcher: Watcher, jobs: Callable[[], LaunchedJobs], redo_from: str | None = None
    ) -> None:
        """`jobs`: how the run would start its ranks; on several machines that waits until all have come."""
        self.plan, self.watcher, self.redo_from = plan, watcher, redo_from
        self.jobs: Ground[LaunchedJobs] = Ground("a way to start ranks", jobs)
        self.cache = cache_folder(plan)
        self.run_dir: Ground[RunDir] = Ground("a run folder", lambda: choose_run_dir(plan))
        self.counts: Ground[tuple[int, ...]] = Ground("a number of ranks", self._counts)
        self.ranks: Ground[int] = Ground("a number of ranks", lambda: sum(self.counts.given()))
        self.ranks_here: Ground[int] = Ground("a number of ranks", lambda: self.counts.given()[0])
        self.gpus: Ground[tuple[Gpu, ...]] = Ground("an answer of nvidia-smi", gpus_of_this_call)
        self.by_ranks: Ground[Plan] = Ground("a batch", lambda: self._plan(None))
        self.sources: Ground[int] = Ground("a source", lambda: found_sources(plan))
        self.tokenizer: Ground[Tokenizer] = Ground("a tokenizer", self._tokenizer)
        self.base: Ground[Base] = Ground("the base", self._base)
        self.vocabulary: Ground[None] = Ground("a fitting tokenizer", self._vocabulary)
        self.prepared: Ground[PreparedRun] = Ground("the prepared data", self._prepared)
        self.counted: Ground[Plan] = Ground("the prepared data", lambda: self._plan(self.prepared.given()))
        self.files: Ground[dict[str, Content]] = Ground("the filled DeepSpeed file", self._files)
        self.probe: Ground[Content] = Ground("an answer of torch", self._probe)
        self.hardware: Ground[fitting.Hardware] = Ground(
            "the hardware", lambda: fitting.hardware_here(self.ranks.given(), len(self.counts.given()))
        )
        self.fits: Ground[list[fitting.PhaseFit]] = Ground("an estimate", self._fits)
        self.merge_fit: Ground[fitting.MergeFit | None] = Ground("an estimate", self._merge_fit)
        self.disk: Ground[list[fitting.DiskNeed]] = Ground("an estimate", self._disk)
        self.times: Ground[list[fitting.PhaseTime]] = Ground("an estimate", self._times)

    @property
    def root(self) -> Path:
        """The run folder, which may not be there yet."""
        return self.run_dir.given().root.resolve()

    def _counts(self) -> tuple[int, ...]:
        """Ranks of each machine, this one first."""
        launch = self.plan.config.launch
        if launch.hostfile is not None:
            return tuple(host.slots for host in read_hostfile(Path(launch.hostfile)))
        return (1 if launch.launcher == "inline" else ranks_here(launch.num_gpus),) * launch.nnodes

    def _plan(self, prepared: PreparedRun | None) -> Plan:
        epochs = {phase.plan.name: phase.epoch for phase in prepared.phases} if prepared else {}
        return make_plan(Loaded(self.plan.config, self.plan.places), self.ranks.given(), epochs)

    def _tokenizer(self) -> Tokenizer:
        model = self.plan.config.model
        name = model.tokenizer or model.name
        if name is None:
            raise Skipped("skipped, because neither a tokenizer nor a base is named")
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError:  # the check of write access says why
            raise Skipped(f"skipped, because {self.cache} cannot be made") from None
        return load_tokenizer(name, model.revision if model.tokenizer is None else None, model.eos_token, self.cache)

    def _base(self) -> Base:
        self.watcher.tell("looking at the base …")
        return base_of(self.plan, self.root, self.cache)

    def _vocabulary(self) -> None:
        tokenizer = self.tokenizer.given()
        self.base.given().require_ids(tokenizer.vocabulary, tokenizer.name)

    def _prepared(self) -> PreparedRun:
        self.sources.given()
        self.tokenizer.given()
        if self.vocabulary.failed:  # without a base it is prepared all the same
            self.vocabulary.given()
        self.watcher.tell("reading the data …")
        return prepare(self.plan if self.by_ranks.missing else self.by_ranks.given(), self.watcher)

    def _files(self) -> dict[str, Content]:
        base = self.base.given()
        return {phase.name: fitting.filled_file(phase, base) for phase in self.by_ranks.given().phases}

    def _probe(self) -> Content:
        self.watcher.tell("asking torch …")
        return asked(self.plan, None if self.base.missing else self.base.given())

    def _fits(self) -> list[fitting.PhaseFit]:
        self.files.given()
        return fitting.fit(self.by_ranks.given(), self.base.given(), self.hardware.given())

    def _merge_fit(self) -> fitting.MergeFit | None:
        self.files.given()
        return fitting.fit_merge(self.by_ranks.given(), self.base.given(), self.hardware.given())

    def _data(self) -> PreparedRun | None:
        return None if self.prepared.missing else self.prepared.given()

    def _disk(self) -> list[fitting.DiskNeed]:
        self.sources.given()
        self.files.given()
        return fitting.disk_needs(self.by_ranks.given(), self.base.given(), self.root, self.cache, self._data())

    def _times(self) -> list[fitting.PhaseTime]:
        self.files.given()
        hardware = self.hardware.given()
        return fitting.phase_times(self.counted.given(), self.base.given(), self._data(), self.cache, hardware)
