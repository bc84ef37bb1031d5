"""What our hooks, checks and sinks cost: a phase of ours beside a bare Trainer script, and the conductor's own time.

    make bench-train

Both train the same model on the same rows in the same order with the same DeepSpeed file, in processes started alike,
and they take turns. What counts is the ratio of a pair: the machine is shared. Steps are counted from the fifth on.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from phased_cpt.conductor import conduct
from phased_cpt.config import from_record
from phased_cpt.data.watch import Unwatched
from phased_cpt.doors import LaunchedJobs
from phased_cpt.job import Job
from phased_cpt.launchers import Command, launched
from phased_cpt.launchers.commands import local
from phased_cpt.plan import Wanted, make_plan
from phased_cpt.run_dir import RunDir
from phased_cpt.stopping import Stopping

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "dataset/sample"
ROUNDS, STEPS, WARM, RANKS = 3, 30, 5, 2
HANG_SECONDS = 600.0
SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def config(folder: Path, stage: str, steps: int = STEPS) -> dict:
    phase = {"sources": str(SAMPLE / "phase1_foundation.jsonl"), "max_steps": steps}
    return {
        "run": {"name": "bench", "dir": str(folder), "cache_dir": str(folder.parent / "cache")},
        "model": {"from_config": SHAPE, "tokenizer": str(SAMPLE / "tokenizer.json"), "precision": "fp32"},
        "lora": {"r": 16, "alpha": 32, "target_modules": "auto"},
        "data": {"max_tokens": 512, "overlap_tokens": 32},
        "training": {"micro_batch_size": 2, "global_batch_size": 4, "learning_rate": 1e-3, "deepspeed": stage},
        "evaluation": {"every_steps": 10**6},
        "phases": [{"name": "one", **phase}, {"name": "two", **phase}],
    }


class Timed(LaunchedJobs):
    """The first door, with a clock at it."""

    def train(self, job: Job, stop: Stopping) -> None:
        calls.append([time.time(), 0.0])
        super().train(job, stop)
        calls[-1][1] = time.time()


calls: list[list[float]] = []


def ours(folder: Path, stage: str) -> dict[str, float]:
    """A phase of ours, through the launcher: seconds a step, seconds to the first step."""
    shutil.rmtree(folder, ignore_errors=True)
    plan = make_plan(from_record(config(folder, stage), "bench"))
    calls.clear()
    door = Timed("local", RANKS, HANG_SECONDS)
    conduct(plan, RunDir(folder), door, Wanted(last="one"), Unwatched(), lambda *seen: None)
    lines = [json.loads(line) for line in (folder / "phase1_one/logs/train.jsonl").read_text().splitlines()]
    ended = [datetime.fromisoformat(line["ts"]).timestamp() for line in lines]
    return {
        "step": (ended[-1] - ended[WARM - 1]) / (STEPS - WARM),
        "start": ended[0] - (ended[1] - ended[0]) - calls[0][0],
        "own": sum(float(part.split()[0]) for part in named(folder)),
    }


def named(folder: Path) -> list[str]:
    """The seconds of what a start of ours does besides, as the log tells them."""
    log = (folder / "logs/training.log").read_text()
    isolation = log.split("of what it could (")[1].split(")")[0]
    return [isolation, log.split("evaluated before step 0 in ")[1].split("\n")[0]]


def bare(folder: Path, stage: str) -> dict[str, float]:
    """The same by the bare script, from the job that ours has left."""
    times = folder.parent / "times.json"
    job = folder / "phase1_one/job.json"
    script = [sys.executable, str(REPOSITORY / "benchmarks/bare_trainer.py"), str(job), str(times)]
    environment = [command.environment for command in local(job, RANKS)]
    logs = [folder.parent / f"bare{rank}.log" for rank in range(RANKS)]
    begun = time.time()
    commands = [Command(log.stem, script, each, log) for each, log in zip(environment, logs, strict=True)]
    launched(commands, folder.parent, Stopping(), HANG_SECONDS)
    for left in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):  # 66 MB a rank, which DeepSpeed leaves for good
        if left.stat().st_mtime > begun:
            left.unlink()
    found = json.loads(times.read_text())
    return {
        "step": (found["ended"][-1] - found["ended"][WARM - 1]) / (STEPS - WARM),
        "start": found["begun"][0] - begun,
    }


def gaps(folder: Path, stage: str) -> float:
    """From the end of a job to the start of the next."""
    plan = make_plan(from_record(config(folder, stage, 2), "bench"))
    shutil.rmtree(folder, ignore_errors=True)
    calls.clear()
    conduct(plan, RunDir(folder), Timed("local", RANKS, HANG_SECONDS), Wanted(), Unwatched(), lambda *seen: None)
    return calls[1][0] - calls[0][1]


def middle(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} – {max(values):.3f})"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        print(f"{ROUNDS} pairs, {RANKS} ranks, {STEPS} steps each; median (smallest – largest)\n")
        heads = ["ZeRO", "ours, s a step", "bare, s a step", "ratio of a pair", "start, ours − bare, s"]
        print(f"| {' | '.join([*heads, 'of it isolation and evaluation, s'])} |\n|---|---|---|---|---|---|")
        for stage in sys.argv[1:] or ("zero2", "zero3"):
            pairs = [(ours(folder, stage), bare(folder, stage)) for _ in range(ROUNDS)]
            cells = [
                middle([one["step"] for one, _ in pairs]),
                middle([other["step"] for _, other in pairs]),
                middle([one["step"] / other["step"] for one, other in pairs]),
                middle([one["start"] - other["start"] for one, other in pairs]),
                middle([one["own"] for one, _ in pairs]),
            ]
            print(f"| {stage} | {' | '.join(cells)} |", flush=True)
        print(
            f"\nfrom the end of a job to the start of the next: {middle([gaps(folder, 'zero2') for _ in range(3)])} s"
        )


if __name__ == "__main__":
    main()
