"""The memory estimate beside what a phase takes: real phases on the CPU, each of a gigabyte or more.

    make bench-memory                                   all of them: a quarter of an hour on two cores
    .venv/bin/python benchmarks/memory.py "plain loss"  one

The ranks are those of a run (benchmarks/memory_ranks.py), on bases of random weights. Counted is the most that a rank
has for itself (RssAnon and RssShmem), less the same of a tiny model trained alike: the interpreter, torch and what
stands on it. glibc is told to give back what is freed (MALLOC_…), or else its habits would be measured, too.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from phased_cpt.bases import Base
from phased_cpt.conductor import conduct
from phased_cpt.config import from_record
from phased_cpt.data.watch import Unwatched
from phased_cpt.doors import WORKER, LaunchedJobs
from phased_cpt.estimate.memory import Estimate
from phased_cpt.fitting import Hardware, fit
from phased_cpt.job import Job
from phased_cpt.launchers import Place, Program, launched
from phased_cpt.launchers.commands import local
from phased_cpt.plan import Plan, Wanted, make_plan
from phased_cpt.run_dir import RunDir
from phased_cpt.stopping import Stopping

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "dataset/sample"
HANG_SECONDS = 900.0
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SETTINGS = MALLOC | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
WITHIN = 0.15  # of the measured peak
MAKE_BASE = (
    "import json, sys; from pathlib import Path; from phased_cpt.model.base import make_random_base; "
    "make_random_base(Path(sys.argv[1]), json.loads(sys.argv[2]), 1)"
)

Shape = dict[str, Any]
TINY: Shape = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
WIDE = TINY | {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 4}
DEEP = TINY | {"hidden_size": 256, "intermediate_size": 64, "num_key_value_heads": 1, "num_hidden_layers": 32}
WORDS = {"vocab_size": 131_072}
EVERY_WEIGHT = {"lora": {"enabled": False}}
SHORT = {"max_tokens": 64}


@dataclass(frozen=True)
class Case:
    """A phase."""

    shape: Shape
    ranks: int = 1
    steps: int = 2  # the moments of the optimizer come with the first
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def nothing(self) -> "Case":
        """The same kind of phase, of a model and rows that take next to nothing."""
        kind = {name: section for name, section in self.sections.items() if name in ("model", "lora")}
        deepspeed = self.sections.get("training", {}).get("deepspeed")
        return Case(TINY, self.ranks, sections=kind | ({"training": {"deepspeed": deepspeed}} if deepspeed else {}))


def rows(count: int, tokens: int, **more: Any) -> dict[str, Any]:
    """Of a micro batch."""
    training = {"micro_batch_size": count, "gradient_accumulation_steps": 1, **more}
    return {"data": {"max_tokens": tokens}, "training": training}


CASES = {
    "every weight, bf16, ZeRO-2": Case(WIDE | {"num_hidden_layers": 4}, sections=EVERY_WEIGHT),
    "every weight, fp32, ZeRO-2": Case(
        WIDE | {"num_hidden_layers": 4}, sections=EVERY_WEIGHT | {"model": {"precision": "fp32"}}
    ),
    "every weight, bf16, ZeRO-3, two ranks": Case(
        WIDE | {"num_hidden_layers": 8}, ranks=2, sections=EVERY_WEIGHT | {"training": {"deepspeed": "zero3"}}
    ),
    "an adapter on a large base": Case(WIDE | {"num_hidden_layers": 44}),
    "QLoRA, large vocabulary": Case(
        WIDE | WORDS | {"num_hidden_layers": 8}, sections={"model": {"use_4bit": True}} | rows(1, 512, loss="chunked")
    ),
    "long rows, checkpointing": Case(
        DEEP, steps=1, sections={"model": {"precision": "fp32"}} | rows(36, 512)
    ),
    "rows without checkpointing": Case(
        DEEP | {"hidden_size": 128, "intermediate_size": 352, "num_key_value_heads": 2, "num_hidden_layers": 16},
        steps=1,
        sections=rows(16, 512, gradient_checkpointing=False),
    ),
    "plain loss, large vocabulary": Case(TINY | WORDS, steps=1, sections=rows(2, 512, loss="plain")),
    "chunked loss, large vocabulary": Case(
        WIDE | WORDS | {"num_hidden_layers": 1}, steps=1, sections=rows(1, 1024, loss="chunked")
    ),
}  # fmt: skip


def planned(case: Case, folder: Path) -> Plan:
    config: dict[str, Any] = {
        "run": {"name": "memory", "dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        "model": {"name": str(base_of(case, folder)), "tokenizer": str(SAMPLE / "tokenizer.json")},
        "lora": {"r": 8, "alpha": 16, "target_modules": "auto"},
        "data": {"overlap_tokens": 0, "eval_max_tokens": 200, "packing": "concat", **SHORT},
        "training": {"gradient_accumulation_steps": 2, "deepspeed": "zero2"},
        "evaluation": {"every_steps": 10**6},
        "tracking": {"tensorboard": {"enabled": False}},
        "merge": {"enabled": False},
        "phases": [{"name": "one", "sources": str(SAMPLE / "phase1_foundation.jsonl"), "max_steps": case.steps}],
    }
    for name, section in case.sections.items():
        config[name] = config[name] | section
    return make_plan(from_record(config, "memory"), case.ranks)


def base_of(case: Case, folder: Path) -> Path:
    """Random weights, made by a process of their own: they are in fp32 then, and would be the most."""
    name = "-".join(str(size) for size in case.shape.values())
    base = folder / "bases" / name
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-c", MAKE_BASE, str(base), json.dumps(case.shape)], check=True, cwd=REPOSITORY)
    return base


# Predicted ------------------------------------------------------------------------------------------------------------


def predicted(case: Case, folder: Path) -> Estimate:
    """Of one rank; on a CPU all of it is host memory."""
    plan = planned(case, folder)
    found = fit(plan, Base(str(base_of(case, folder)), ""), Hardware(case.ranks, 1, None, 2**50))
    return found[0].host


# Measured -------------------------------------------------------------------------------------------------------------


class Watched(LaunchedJobs):
    """The first door, with somebody beside each rank who looks at its memory."""

    def train(self, job: Job, stop: Stopping) -> None:
        logs, results = job.path.parent / "logs", job.path.parent / "memory"
        results.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, str(REPOSITORY / "benchmarks/memory_ranks.py"), str(job.path), str(results)]
        commands = [
            replace(command, words=words, environment=command.environment | SETTINGS, log=logs / f"rank{rank}.log")
            for rank, command in enumerate(local(Program(WORKER, job.path, logs), Place.alone(self.ranks)))
        ]
        launched(commands, logs, stop, self.hang_seconds)


def peaks(case: Case, folder: Path) -> list[int]:
    """The most of each rank."""
    plan = planned(case, folder)
    place = tempfile.mkdtemp(dir=folder)
    run = RunDir(Path(place) / "run")
    door = Watched("local", case.ranks, HANG_SECONDS)
    conduct(plan.without_run_dir(), run, door, Wanted(), Unwatched(), lambda *seen: None)
    found = [json.loads((run.root / f"phase1_one/memory/memory-{rank}.json").read_text()) for rank in range(case.ranks)]
    return [max(moment["bytes"] for moment in moments.values()) for moments in found]


def measured(case: Case, folder: Path) -> list[int]:
    """The most of each rank, without what a tiny model takes as well."""
    nothing = _of_nothing(json.dumps(asdict(case.nothing)), folder)
    return [peak - without for peak, without in zip(peaks(case, folder), nothing, strict=True)]


@functools.cache
def _of_nothing(case: str, folder: Path) -> list[int]:
    """Once for all phases of a kind."""
    return peaks(Case(**json.loads(case)), folder)


def main() -> None:
    print(
        "| phase | predicted, MB | at | measured, MB, by rank | predicted / measured | s |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or CASES:
            began, estimate = time.monotonic(), predicted(CASES[name], Path(scratch))
            found = measured(CASES[name], Path(scratch))
            shares = ", ".join(f"{estimate.peak / each:.3f}" for each in found)
            told = ", ".join(f"{each / 1e6:,.0f}" for each in found)
            cells = [name, f"{estimate.peak / 1e6:,.0f}", estimate.moment, told, shares]
            print(f"| {' | '.join(cells)} | {time.monotonic() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
