"""The memory estimate beside what a phase takes, and a merge: real ones on the CPU, each phase of a gigabyte or more.

    make bench-memory                                   all of them: a quarter of an hour on two cores
    .venv/bin/python benchmarks/memory.py "tied head"   one of them, a phase or a merge

The ranks are those of a run (benchmarks/memory_ranks.py), on bases of random weights; a merge is its child process,
looked at from outside. Counted is the most that either has for itself (RssAnon and RssShmem), less the same of a tiny
model treated alike: the interpreter, torch and what stands on it. glibc is told to give back what is freed (MALLOC_…),
or else its habits would be measured, too.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from phased_cpt.bases import Base
from phased_cpt.conductor import conduct
from phased_cpt.config import from_record
from phased_cpt.data.prepare import prepare
from phased_cpt.data.watch import Unwatched
from phased_cpt.doors import WORKER, LaunchedJobs
from phased_cpt.estimate.architecture import architecture_of
from phased_cpt.estimate.memory import Estimate
from phased_cpt.estimate.merging import MergeRecipe, merge_estimate
from phased_cpt.estimate.recipe import HALF
from phased_cpt.fitting import Hardware, fit
from phased_cpt.job import Job
from phased_cpt.launchers import Place, Program, launched
from phased_cpt.launchers.commands import local
from phased_cpt.merging import FourBitBase, Layer, MergeJob, merge
from phased_cpt.plan import Plan, Wanted, make_plan
from phased_cpt.published import weights_digest
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


# Merges ---------------------------------------------------------------------------------------------------------------

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
EXPERTS: Shape = {
    "model_type": "mixtral", "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 1,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MAKE_INPUTS = """
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(1)
base, adapter, shape, r, targets = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
model = model.to_empty(device="cpu")
model.tie_weights()
for weight in model.parameters():
    weight.data.normal_(0, 0.02)
model.save_pretrained(base)
adapted = get_peft_model(model, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
for weight in adapted.parameters():
    if weight.requires_grad:
        weight.data = torch.empty_like(weight, dtype=torch.float32).normal_(0, 0.002)
adapted.save_pretrained(adapter)
"""
LOOKED_AT_SECONDS = 0.002


@dataclass(frozen=True)
class MergeCase:
    """A merge of an adapter into a base in bf16."""

    shape: Shape
    r: int = 16
    targets: tuple[str, ...] = LINEARS
    four_bits: bool = False
    base_kind: str = "auto"
    held_out_tokens: int = 0  # to measure both bases on

    @property
    def nothing(self) -> "MergeCase":
        return replace(self, shape=TINY, r=4, targets=LINEARS, held_out_tokens=0)


MERGES = {
    "tall vocabulary": MergeCase(TINY | {"vocab_size": 400_000, "hidden_size": 128}),
    "wide layers": MergeCase(
        WIDE | {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32, "num_hidden_layers": 1},
        r=64,
    ),
    "tied head": MergeCase(
        WIDE | {"vocab_size": 151_936, "hidden_size": 2048, "tie_word_embeddings": True, "num_hidden_layers": 2}
    ),
    "experts": MergeCase(EXPERTS, targets=ATTENTION),
    "what 4 bits left": MergeCase(
        WIDE | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1},
        four_bits=True, base_kind="dequantized",
    ),
    "both bases measured": MergeCase(WIDE | WORDS | {"num_hidden_layers": 1}, four_bits=True, held_out_tokens=1024),
}  # fmt: skip


def merge_predicted(case: MergeCase) -> Estimate:
    kind = case.base_kind if case.held_out_tokens or not case.four_bits else "dequantized"
    recipe = MergeRecipe(case.r, case.targets, HALF, HALF, four_bits=case.four_bits, base_kind=kind, on_gpu=False)
    return merge_estimate(architecture_of(case.shape), recipe)


def merge_measured(case: MergeCase, folder: Path) -> int:
    """The most of the merge's process, without what one of a tiny model takes as well."""
    return merge_peak(case, folder) - _of_no_merge(json.dumps(asdict(case.nothing)), folder)


@functools.cache
def _of_no_merge(case: str, folder: Path) -> int:
    """Once for all merges of a kind."""
    return merge_peak(MergeCase(**json.loads(case)), folder)


def merge_peak(case: MergeCase, folder: Path) -> int:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        base, adapter = place / "base", place / "adapter"
        words = [str(base), str(adapter), *map(json.dumps, (case.shape, case.r, case.targets))]
        subprocess.run([sys.executable, "-c", MAKE_INPUTS, *words], check=True, capture_output=True)
        job = MergeJob(
            base=str(base), base_digest=weights_digest(base),
            adapters=(Layer(str(adapter), weights_digest(adapter)),), output=str(place / "merged"),
            dtype="auto", max_shard_size=2 * 10**9, four_bits=FourBitBase("bf16", "auto") if case.four_bits else None,
            base_kind=case.base_kind, held_out=_held_out(case, place) if case.held_out_tokens else None,
        )  # fmt: skip
        beside = Beside()
        beside.start()
        with patch.dict(os.environ, MALLOC):  # which the child has from here
            merge(job)
        beside.ended.set()
        beside.join()
        return beside.peak


def _held_out(case: MergeCase, folder: Path) -> str:
    """The block index of documents that no phase was trained on."""
    data = {"max_tokens": 128, "eval_share": 0.5, "eval_max_tokens": case.held_out_tokens}
    found = prepare(planned(Case(TINY, sections={"data": data}), folder)).phases[0].eval
    assert found is not None
    return str(found.index.folder)


class Beside(threading.Thread):
    """Looks at the memory of the children that come now; who measures may have others."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended, self._others = 0, threading.Event(), set(_children())

    def run(self) -> None:
        while not self.ended.wait(LOOKED_AT_SECONDS):
            for child in set(_children()) - self._others:
                self.peak = max(self.peak, _own(Path(f"/proc/{child}/status")))


def _children() -> list[str]:
    found: list[str] = []
    for tasks in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found += tasks.read_text().split()
    return found


def _own(status: Path) -> int:
    try:
        lines = status.read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


# Tables ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    print("| phase or merge | predicted, MB | at | measured, MB, by rank | predicted / measured | s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or (*CASES, *MERGES):
            began, folder = time.monotonic(), Path(scratch)
            if name in MERGES:
                estimate, found = merge_predicted(MERGES[name]), [merge_measured(MERGES[name], folder)]
            else:
                estimate, found = predicted(CASES[name], folder), measured(CASES[name], folder)
            shares = ", ".join(f"{estimate.peak / each:.3f}" for each in found)
            told = ", ".join(f"{each / 1e6:,.0f}" for each in found)
            cells = [name, f"{estimate.peak / 1e6:,.0f}", estimate.moment, told, shares]
            print(f"| {' | '.join(cells)} | {time.monotonic() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
