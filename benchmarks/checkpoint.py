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
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from phased_cpt.conductor import conduct
from phased_cpt.config import from_record
from phased_cpt.data.watch import Unwatched
from phased_cpt.doors import LaunchedJobs
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
SAVED_EVERY, DEFAULT_EVERY, NEVER = 5, 50, 10**6  # steps between checkpoints
WARM = 5  # steps that are not counted
Config = dict[str, Any]
Found = dict[str, Any]
Cells = Callable[[Found], list[str]]  # of a row


@dataclass(frozen=True)
class Size:
    """Of models and repetitions."""

    lora: tuple[int, int, int]  # hidden size, layers, r
    whole: tuple[int, int]  # hidden size, layers; every weight is trained
    rounds: int  # of saves and loads
    pairs: int  # of phases, and of restarts
    steps: int

    @property
    def kinds(self) -> dict[str, Config]:
        """About ten million trained weights each."""
        *shape, r = self.lora
        adapter = {"r": r, "alpha": 2 * r, "target_modules": "auto"}
        return {
            f"LoRA r {r}": {"model": {"from_config": llama(*shape)}, "lora": adapter},
            "every weight": {"model": {"from_config": llama(*self.whole)}, "lora": {"enabled": False}},
        }

    @property
    def adapter(self) -> Config:
        """The kind of the phases whose time is taken."""
        return next(iter(self.kinds.values()))


FULL = Size(lora=(512, 8, 128), whole=(384, 4), rounds=5, pairs=3, steps=30)
SMALL = Size(lora=(128, 2, 8), whole=(128, 2), rounds=2, pairs=1, steps=12)


def main() -> int:
    parts = {"saves": saves, "lost": lost, "restart": restart}
    parser = argparse.ArgumentParser(description="What checkpoints cost.")
    parser.add_argument("--only", choices=parts, help="one part of it")
    parser.add_argument("--small", action="store_true", help="tiny, to see that it works; its figures mean nothing")
    said = parser.parse_args()
    size, wanted = SMALL if said.small else FULL, [said.only] if said.only else list(parts)
    with tempfile.TemporaryDirectory() as scratch:
        sound = [parts[name](size, Path(scratch)) for name in wanted]
    return 0 if all(sound) else 1


def llama(hidden: int, layers: int) -> Config:
    """A small one; its weights are drawn."""
    return {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": hidden, "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128,
        "max_position_embeddings": 256,
    }  # fmt: skip


def config(folder: Path, kind: Config, stage: str, steps: int, every: int) -> Config:
    """One phase of so many steps, with a checkpoint every so many."""
    return {
        "run": {"name": "bench", "dir": str(folder), "cache_dir": str(folder.parent / "cache")},
        "model": {**kind["model"], "tokenizer": str(SAMPLE / "tokenizer.json"), "precision": "bf16"},
        "lora": kind["lora"],
        "data": {"max_tokens": 128, "overlap_tokens": 8, "eval_max_tokens": 2000},
        "training": {"micro_batch_size": 1, "global_batch_size": 2, "learning_rate": 1e-3, "deepspeed": stage},
        "evaluation": {"every_steps": NEVER},
        "checkpoint": {"every_steps": every},
        "launch": {"num_gpus": RANKS},
        "phases": [{"name": "one", "sources": str(SAMPLE / "phase1_foundation.jsonl"), "max_steps": steps}],
    }


# Saves and loads ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measuring(LaunchedJobs):
    """The first door, whose ranks save and load more often than a worker does."""

    figures: Path
    rounds: int

    def train(self, job: Job, stop: Stopping) -> None:
        logs = job.path.parent / "logs"
        program = REPOSITORY / "benchmarks/checkpoint_ranks.py"
        words = [sys.executable, str(program), str(job.path), str(self.figures), str(self.rounds)]
        started = enumerate(local(job.path, self.ranks))
        ranks = [replace(command, words=words, log=logs / f"rank{at}.log") for at, command in started]
        launched(ranks, logs, stop, self.hang_seconds)


def saves(size: Size, scratch: Path) -> bool:
    """Bytes and seconds of a checkpoint, ours and DeepSpeed's; whether ours is as small as it must be."""
    found = {
        (kind, stage): measured(size.kinds[kind], stage, size.rounds, scratch)
        for kind in size.kinds
        for stage in STAGES
    }
    print(f"## A checkpoint\n\n{RANKS} ranks, bf16, AdamW, after 2 steps; {size.rounds} rounds in turns in one job\n")
    table(["ours, MB", "native, MB", "ours, bytes a trained weight", "native"], found, bytes_of)
    table(
        ["ours, s to save", "native", "ratio", "native, fsync and sha256", "ratio"], found, saving,
        "DeepSpeed's save neither syncs nor hashes its files; ours does both, and deletes the checkpoint before it. In "
        "the last columns each rank syncs and hashes its share of DeepSpeed's files after its save.",
    )  # fmt: skip
    table(
        ["ours, s to load", "native", "ratio", "the conductor's look at it, s"], found, loading,
        "Into a model and an engine that are built, from files that are in memory. Ours reads every moment and every "
        "master back, and compares it with the file; the conductor hashes each file once before.",
    )  # fmt: skip
    large = [f"{kind}, {stage}" for (kind, stage), one in found.items() if one["our bytes"] / one["weights"] > LARGEST]
    if large:
        print(f"more than {LARGEST:.2f} bytes a trained weight: {'; '.join(large)}")
    return not large


def measured(kind: Config, stage: str, rounds: int, scratch: Path) -> Found:
    """Three steps, and the measurements behind the second."""
    folder, figures = scratch / "run", scratch / "figures.json"
    shutil.rmtree(folder, ignore_errors=True)
    plan = make_plan(from_record(config(folder, kind, stage, steps=3, every=2), "bench"))
    door = Measuring("local", RANKS, HANG_SECONDS, figures, rounds)
    conduct(plan, RunDir(folder), door, Wanted(), Unwatched(), lambda *seen: None)
    return json.loads(figures.read_text())


def bytes_of(one: Found) -> list[str]:
    both, weights = (one["our bytes"], one["native bytes"]), one["weights"]
    return [*(f"{each / 1e6:.1f}" for each in both), *(f"{each / weights:.2f}" for each in both)]


def saving(one: Found) -> list[str]:
    ours, native, synced = one["our saves"], one["native saves"], one["native saves, synced"]
    return [middle(ours), middle(native), ratios(ours, native), middle(synced), ratios(ours, synced)]


def loading(one: Found) -> list[str]:
    ours, native = one["our loads"], one["native loads"]
    return [middle(ours), middle(native), ratios(ours, native), middle(one["verifications"])]


def table(heads: list[str], found: dict[tuple[str, str], Found], cells: Cells, note: str = "") -> None:
    """A row for each kind and stage."""
    heads = ["trained", "ZeRO", "weights", *heads]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for (kind, stage), one in found.items():
        print(f"| {kind} | {stage} | {one['weights']:,} | {' | '.join(cells(one))} |")
    print(f"\n{note}\n" if note else "", flush=True)


# Training time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """When the steps of a phase ended, and the seconds that its saves say they took."""

    ended: dict[int, float]
    told: list[float]

    @property
    def seconds(self) -> float:
        """From the end of the last warm step to that of the last."""
        return self.ended[max(self.ended)] - self.ended[WARM]

    @property
    def steps(self) -> int:
        return max(self.ended) - WARM

    @property
    def behind_saves(self) -> list[float]:
        """By how much a step behind a save ends later than the others do."""
        taken = {step: at - self.ended[step - 1] for step, at in self.ended.items() if step > WARM}
        usual = statistics.median(each for step, each in taken.items() if (step - 1) % SAVED_EVERY)
        return [each - usual for step, each in taken.items() if (step - 1) % SAVED_EVERY == 0]


def lost(size: Size, scratch: Path) -> bool:
    """What saves add to a phase."""
    pairs = []
    for _ in range(size.pairs):
        never = course(config(scratch / "run", size.adapter, "zero2", size.steps, NEVER))
        saved = course(config(scratch / "run", size.adapter, "zero2", size.steps, SAVED_EVERY))
        pairs.append((never, saved))
    steps = [never.seconds / never.steps for never, _ in pairs]
    paired = [(saved.seconds - never.seconds) / len(saved.behind_saves) for never, saved in pairs]
    within = [each for _, saved in pairs for each in saved.behind_saves]
    said = [each for _, saved in pairs for each in saved.told]
    a_step = statistics.median(steps)
    print(
        f"## Training time\n\n{next(iter(size.kinds))}, zero2, {size.steps} steps; {size.pairs} pairs in turns, "
        f"saved every {SAVED_EVERY} steps and never; {middle(steps)} s a step without saves\n\n"
        f"| a save costs | s | of the training time, every {DEFAULT_EVERY} steps | 1 % where a step takes, s |\n"
        "|---|---|---|---|"
    )
    ways = {
        "by the difference of a pair": paired,
        "by how much later the next step ends": within,
        "as its own line says": said,
    }
    for name, seconds in ways.items():
        a_save = statistics.median(seconds)
        part, break_even = a_save / (a_save + DEFAULT_EVERY * a_step), 99 * a_save / DEFAULT_EVERY
        print(f"| {name} | {middle(seconds)} | {part:.2%} | {break_even:.2f} |")
    print(flush=True)
    return True


def course(content: Config) -> Course:
    """The phase from its begin to its end."""
    folder = Path(content["run"]["dir"])
    shutil.rmtree(folder, ignore_errors=True)
    run(content, 0)
    told = re.findall(r"checkpoint-\d+: [\d.]+ MB in ([\d.]+) s", (folder / "logs/training.log").read_text())
    return Course(ended_steps(folder), [float(each) for each in told])


# Restart --------------------------------------------------------------------------------------------------------------


def restart(size: Size, scratch: Path) -> bool:
    """From the command line to the end of the first step, behind which each call stops."""
    late = size.steps - WARM
    runs = {name: config(scratch / name, size.adapter, "zero2", size.steps, NEVER) for name in ("new", "early", "late")}
    run(runs["early"], 75, "--steps-today", "1")
    run(runs["late"], 75, "--steps-today", str(late))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(size.pairs):
        shutil.rmtree(scratch / "new", ignore_errors=True)
        for name, step in (("new", 1), ("early", 2 + done), ("late", late + 1 + done)):
            begun = run(runs[name], 75, "--steps-today", "1")
            found[name].append(ended_steps(scratch / name)[step] - begun)
    names = {"new": "from nothing", "early": after(1, size.pairs), "late": after(late, size.pairs)}
    print(
        f"## Restart\n\n`phased-cpt run`, {next(iter(size.kinds))}, zero2, {size.steps} steps, {size.pairs} rounds in "
        "turns, the data prepared before; from nothing it also draws the base and evaluates before step 0\n\n"
        "| | s to the end of the first step | ratio |\n|---|---|---|"
    )
    for name, seconds in found.items():
        print(f"| {names[name]} | {middle(seconds)} | {ratios(seconds, found['new'])} |")
    print(flush=True)
    return True


def after(step: int, rounds: int) -> str:
    """Each round goes on where the one before has stopped."""
    return f"going on after step {step} – {step + rounds - 1}" if rounds > 1 else f"going on after step {step}"


# Runs and figures -----------------------------------------------------------------------------------------------------


def run(content: Config, code: int, *options: str) -> float:
    """The command line, which is to end with this code; when it was called."""
    file = Path(content["run"]["dir"]).with_suffix(".json")
    file.write_text(json.dumps(content))
    command = [str(Path(sys.executable).with_name("phased-cpt")), "run", "-c", str(file), *options]
    begun = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != code:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}, not {code}\n{done.stderr}")
    return begun


def ended_steps(folder: Path) -> dict[int, float]:
    """When each step of the phase ended."""
    lines = [json.loads(line) for line in (folder / "phase1_one/logs/train.jsonl").read_text().splitlines()]
    return {line["step"]: datetime.fromisoformat(line["ts"]).timestamp() for line in lines}


def middle(values: list[float]) -> str:
    """As every table has it: median (smallest – largest)."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} – {max(values):.3f})"


def ratios(ours: list[float], others: list[float]) -> str:
    return middle([one / other for one, other in zip(ours, others, strict=True)])


if __name__ == "__main__":
    sys.exit(main())
