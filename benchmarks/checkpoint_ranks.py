"""In the ranks: a phase of ours which, where its checkpoint is due, saves and loads in turns with DeepSpeed.

RANK=… python benchmarks/checkpoint_ranks.py <phase folder>/job.json <file for the figures> <rounds>
                                                                                     (started by checkpoint.py)
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from phased_cpt import worker
from phased_cpt.data.cache import sha256_of
from phased_cpt.sealed import fault_of
from phased_cpt.train import checkpoint, moments
from phased_cpt.train.engine import meet
from phased_cpt.train.masters import bit_sums, put_back, trained
from phased_cpt.train.phase_run import PhaseRun


class Measured(PhaseRun):
    """The worker's run; after its measurements it trains on and publishes, so that its own checks look at all of it."""

    figures: Path
    rounds: int

    def _save(self) -> None:
        """The checkpoint that is due, and then those that are measured."""
        super()._save()
        self.ours = self.saves.folder / f"checkpoint-{self.standing.step}"
        self.native = self.folder / "native"
        weights = sum(getattr(weight, "ds_numel", weight.numel()) for _, weight in trained(self.model))
        found: dict[str, Any] = {"weights": weights} | self._saved()
        found |= {"our bytes": size_of(self.ours), "native bytes": size_of(self.native)}
        found |= self._loaded()
        if self.rank.first:
            self.figures.write_text(json.dumps(found))
            shutil.rmtree(self.native)

    # Saved ------------------------------------------------------------------------------------------------------------

    def _saved(self) -> dict[str, list[float]]:
        """Seconds of each save: ours with all that PhaseRun does there, and DeepSpeed's."""
        ours, native, synced = [], [], []
        for _ in range(self.rounds):
            ours.append(self._seconds(lambda: self.saves.checkpoint(self.model, self.engine)))
            if self.rank.first:
                shutil.rmtree(self.native, ignore_errors=True)
            native.append(self._seconds(self._save_native))
            synced.append(native[-1] + self._seconds(self._sync_and_hash, settle=False))
        return {"our saves": ours, "native saves": native, "native saves, synced": synced}

    def _save_native(self) -> None:
        self.engine.save_checkpoint(str(self.native), exclude_frozen_parameters=True)

    def _sync_and_hash(self) -> None:
        """What makes a save safe and provable, done to DeepSpeed's files: each rank takes its share of them."""
        files = sorted(path for path in self.native.rglob("*") if path.is_file())
        for path in files[self.rank.number :: self.rank.of]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sha256_of(path)

    # Loaded -----------------------------------------------------------------------------------------------------------

    def _loaded(self) -> dict[str, list[float]]:
        """Seconds of each load into an engine that has lost everything; DeepSpeed's first, ours is trained on with."""
        native, ours, verified = [], [], []
        self.bits = bit_sums(self.model)
        for _ in range(self.rounds):
            native.append(self._load(self._load_native))
            verified.append(self._seconds(self._verify))
            ours.append(self._load(self._load_ours))
        return {"our loads": ours, "native loads": native, "verifications": verified}

    def _load(self, load: Callable[[], None]) -> float:
        """All of it has come back, or there is nothing to measure."""
        self._lose_all()
        seconds = self._seconds(load)
        checkpoint.require_restored(self.model, self.engine, self.ours)
        if bit_sums(self.model) != self.bits:
            raise RuntimeError(f"{load.__name__}: the masters did not come back")
        return seconds

    def _lose_all(self) -> None:
        """No master and no moment is what it was."""
        for flat, state in moments.states(self.engine):
            flat.data.zero_()
            for value in state.values():
                if isinstance(value, Tensor) and value.numel() > 1:
                    value.zero_()
        if bit_sums(self.model) == self.bits:
            raise RuntimeError("nothing was lost, so a load would prove nothing")

    def _load_native(self) -> None:
        self.engine.load_checkpoint(str(self.native), load_module_strict=False)

    def _load_ours(self) -> None:
        """As PhaseRun goes on, from when the model is built: `load`, `_begin` and `_go_on`."""
        wrapped: Any = self.trainer.lr_scheduler
        scheduler = getattr(wrapped, "scheduler", wrapped)
        masters = self._as_published(self.ours)
        checkpoint.restore(self.model, self.engine, scheduler, self.rank, self.ours)
        put_back(self.model, masters)
        checkpoint.require_one_weight(self.model)
        checkpoint.require_restored(self.model, self.engine, self.ours)

    def _verify(self) -> None:
        """As the conductor does, in its own process, before it starts the ranks."""
        if self.rank.first and (fault := fault_of(self.ours, self.job.fingerprint)):
            raise RuntimeError(fault)

    # Both -------------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Any:
        return self.trainer.model_wrapped

    def _seconds(self, action: Callable[[], None], settle: bool = True) -> float:
        """Until the last rank is done; what others have left to be written is written before."""
        if settle and self.rank.first:
            os.sync()
        meet(self.rank)
        begin = time.monotonic()
        action()
        meet(self.rank)
        return time.monotonic() - begin


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    Measured.figures, Measured.rounds = Path(sys.argv[2]), int(sys.argv[3])
    worker.PhaseRun = Measured
    worker.main(sys.argv[1:2])
