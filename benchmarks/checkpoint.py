"""What checkpoints cost: beside DeepSpeed's own, in training time, and until the first step after a restart.

    make bench-checkpoint

saves     in one job of ranks: our save and DeepSpeed's, our way back and DeepSpeed's
lost      a phase that saves every few steps beside one that never does
restart   `phased-cpt run` from nothing, beside going on early and late in a phase

What is compared takes turns: the machine is shared, and the ratio of a pair counts. The files are written where TMPDIR
says, which must be a disk: in memory an fsync costs nothing.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from phased_cpt.conductor import conduct
from phased_cpt.config import from_record
from phased_cpt.data.watch import Unwatched
from phased_cpt.doors import LaunchedJobs
from phased_cpt.errors import Interrupted
from phased_cpt.job import Job
from phased_cpt.launchers import launched
from phased_cpt.launchers.commands import local
from phased_cpt.plan import Wanted, make_plan
from phased_cpt.run_dir import RunDir
from phased_cpt.stopping import Stopping

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "dataset/sample"
RANKS, HANG_SECONDS = 2, 600.0
STAGES = ("zero2", "zero3")
LARGEST = 14 * 1.01  # bytes a trained weight
DEFAULT_EVERY, SAVED_EVERY, NEVER = 50, 5, 10**6  # steps between checkpoints
WARM = 5  # steps that are not counted
Config = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Of models and repetitions."""

    lora: tuple[int, int, int]  # hidden size, layers, r
    whole: tuple[int, int]  # hidden size, layers; every weight is trained
    rounds: int  # of saves and loads
    pairs: int  # of phases, and of restarts
    steps: int


FULL = Size(lora=(512, 8, 128), whole=(384, 4), rounds=5, pairs=3, steps=30)
SMALL = Size(lora=(128, 2, 8), whole=(128, 2), rounds=2, pairs=1, steps=12)


def main() -> int:
    parser = argparse.ArgumentParser(description="What checkpoints cost.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"all if absent: {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="tiny, to see that it works; its figures mean nothing")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = [PARTS[part](SMALL if said.small else FULL, Path(scratch)) for part in said.parts or PARTS]
    return 0 if all(found) else 1


# Saves and loads, in one job of ranks ---------------------------------------------------------------------------------


class Measuring(LaunchedJobs):
    """The first door; its ranks run a program of their own, which ends as the worker does."""

    def train(self, job: Job, stop: Stopping) -> None:
        logs = job.path.parent / "logs"
        script = [sys.executable, str(REPOSITORY / "benchmarks/checkpoint_ranks.py"), str(job.path)]
        words = [*script, str(figures_in(job.run)), str(rounds_of(job))]
        ranks = [
            replace(command, words=words, log=logs / f"rank{at}.log")
            for at, command in enumerate(local(job.path, self.ranks))
        ]
        launched(ranks, logs, stop, self.hang_seconds)
