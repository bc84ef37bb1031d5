"""What is saved of a phase under way: checkpoints, the best weights so far, and the room that they take.

checkpoints/   checkpoint-100   checkpoint-50   best-75     every checkpoint.every_steps; the newest checkpoint.keep
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from phased_cpt.job import Job
from phased_cpt.plan import PhasePlan
from phased_cpt.run_dir import CARRIED, disk_failed, require_room
from phased_cpt.sealed import BEST, CHECKPOINT, Manifest, retain
from phased_cpt.train import checkpoint
from phased_cpt.train.engine import Rank
from phased_cpt.train.masters import trained
from phased_cpt.train.standing import Standing

MASTER_BYTES = 4


@dataclass(frozen=True)
class Saves:
    """The folder of it. What takes a model is collective."""

    folder: Path
    job: Job
    phase: PhasePlan
    rank: Rank
    standing: Standing
    tell: Callable[[str], None]
    beat: Callable[[], None]

    @property
    def best(self) -> Path | None:
        """Where the weights are that will be published; None where it is the last ones."""
        best = self.standing.best
        return self.folder / f"{BEST}-{best.step}" if best and self._publishes_best else None

    @property
    def _publishes_best(self) -> bool:
        return self.phase.settings.evaluation.publish == "best"

    def checkpoint(self, model: nn.Module, engine: Any) -> None:
        """All that the phase goes on from."""
        started, step = time.monotonic(), self.standing.step
        folder = self.folder / f"{CHECKPOINT}-{step}"
        with self._a_full_disk_is_told():
            self._sync_the_record()
            best = self.standing.best.step if self.standing.best and self.best else None
            checkpoint.save(model, engine, self.rank, folder, self.standing, self._manifest(step, best), self.beat)
            self._retain()
        if self.rank.first:
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            self.tell(f"{folder.name}: {size:.1f} MB in {time.monotonic() - started:.2f} s")

    def best_weights(self, model: nn.Module) -> None:
        """Of this step."""
        if (slot := self.best) and self.standing.best:
            with self._a_full_disk_is_told():
                checkpoint.save_weights(model, self.rank, slot, self._manifest(self.standing.best.step), self.beat)
                self._retain()

    def carried(self, model: nn.Module, engine: Any) -> None:
        """All that the optimizer knows at the end, where the next phase goes on with it."""
        later = self.job.plan().phases[self.phase.number :]
        if later and later[0].carries:
            with self._a_full_disk_is_told():
                manifest = self._manifest(self.standing.step)
                folder = self.folder.parent / CARRIED
                checkpoint.save(model, engine, self.rank, folder, self.standing, manifest, self.beat)

    def _manifest(self, step: int, best: int | None = None) -> Manifest:
        stage = self.job.deepspeed["zero_optimization"]["stage"]
        made_by = {"ranks": self.rank.of, "zero_stage": stage, "attempt": self.job.attempt}
        return Manifest(step, self.phase.name, self.job.fingerprint, best, made_by)

    def _sync_the_record(self) -> None:
        """The lines up to this step, before the step counts: after a power cut nobody would write them again."""
        for path in (self.folder.parent / "logs").glob("*.jsonl") if self.rank.first else ():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _retain(self) -> None:
        if self.rank.first:
            keep = self.job.plan().config.checkpoint.keep
            retain(self.folder, keep, self.standing.best.step if self.standing.best else None)

    def require_room(self, model: nn.Module) -> None:
        """For what will be saved: hours later would be late to hear of it."""
        assert self.phase.steps is not None
        settings = self.job.plan().config.checkpoint
        weights = sum(getattr(w, "ds_numel", w.numel()) for _, w in trained(model))
        several = min(settings.keep, (self.phase.steps - 1) // settings.every_steps) + 1
        needed = weights * (
            several * checkpoint.BYTES_PER_WEIGHT + (several + 2) * MASTER_BYTES
        )  # each with a best, and published
        if self.rank.first:
            what = f"{several} checkpoints of {weights:,} weights, and what is published"
            require_room(self.folder, needed, what, ", or lower checkpoint.keep")

    @contextlib.contextmanager
    def _a_full_disk_is_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            for left in self.folder.glob(".*.building"):
                shutil.rmtree(left, ignore_errors=True)
            raise disk_failed(error, self.folder, "the last sealed checkpoint is whole") from error
