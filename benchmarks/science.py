"""What replay, handovers and shrinking do to a tiny model: curricula of made-up languages, through the real engine.

    make bench-science                                          three seeds, a quarter of an hour on two quiet cores
    .venv/bin/python benchmarks/science.py --quick              one seed, no intervals

random ─ home, every weight ─┬─ north, with 0, 5, 25 % of home ── control: home again       1 replay
                             ├─ north ─ east ─ south, by each handover; all three at once   2 handover
                             └─ home + λ · what north has changed                           3 λ-sweep

A seed draws the first weights, the adapters and the order of the rows; texts and held-out documents (files of their own)
stay. Two runs at a time, of one rank each, which is forked from a process that has imported everything (tests/zygote.py).
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for the two imports of what is no package, here and in the forked ranks

from benchmarks.science_languages import LANGUAGES, write_languages  # noqa: E402
from phased_cpt.conductor import conduct  # noqa: E402
from phased_cpt.config import from_record  # noqa: E402
from phased_cpt.data.train_tokenizer import train_tokenizer  # noqa: E402
from phased_cpt.data.watch import Unwatched  # noqa: E402
from phased_cpt.plan import Wanted, make_plan  # noqa: E402
from phased_cpt.run_dir import RunDir  # noqa: E402
from tests.zygote import ForkedJobs, Zygote  # noqa: E402

SEEDS, LANES = (1, 2, 3), 2
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of so many values: half the width of the interval, in standard errors
VOCABULARY = 768
SHAPE = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
HOME, NEW, LATER = "home", "north", ("east", "south")
STEPS = {HOME: 400, "phase": 150}  # of 16 rows of 128 tokens
# Each the best of a few for what it learns, at seed 0, which is none of those that are told.
RATES = {HOME: 5e-3, "every weight": 2e-3, "LoRA": 1e-2}
SHARES = (0.0, 0.05, 0.25)
STRENGTHS = (0.3, 0.5, 0.7, 0.85)

Config = dict[str, Any]
Facts = dict[str, Any]


# Runs -----------------------------------------------------------------------------------------------------------------


def phase(name: str, **more: Any) -> Config:
    return {
        "name": name,
        "sources": f"data/{name}.jsonl",
        "eval_sources": f"data/{name}_held_out.jsonl",
        "max_steps": STEPS["phase"],
        **more,
    }


def how(kind: str, **more: Any) -> Config:
    """A phase that trains every weight, or an adapter."""
    return {"lora": {"enabled": kind == "LoRA"}, "training": {"learning_rate": RATES[kind], **more}}


def at_home() -> Config:
    return phase(HOME, max_steps=STEPS[HOME], lora={"enabled": False}, training={"learning_rate": RATES[HOME]})


def config(folder: str, seed: int, phases: Sequence[Config], **sections: Any) -> Config:
    general = sections.pop("general", ())
    return {
        "run": {"name": "science", "dir": folder, "cache_dir": "cache", "seed": seed},
        "model": {"from_config": SHAPE, "tokenizer": "tokenizer", "precision": "fp32"},
        "lora": {"r": 16, "alpha": 32, "dropout": 0, "target_modules": "auto"},
        "data": {"max_tokens": 128, "overlap_tokens": 0},
        "training": {
            "micro_batch_size": 16, "global_batch_size": 16, "warmup_ratio": 0.05, "gradient_checkpointing": False,
            "deepspeed": "zero2",
        },
        "evaluation": {
            "every_steps": 10**6, "micro_batch_size": 64, "publish": "last", "samples": 0,
            "general": {name: f"data/{name}_held_out.jsonl" for name in general},
        },
        "checkpoint": {"every_steps": 10**6},
        "tracking": {"tensorboard": {"enabled": False}},
        "merge": {"enabled": False},
        "phases": list(phases),
        **sections,
    }  # fmt: skip


def ran(config: Config, **wanted: Any) -> Facts:
    """A run, as far as is wanted: its forgetting.json, and the tokens that each phase has trained."""
    plan, root = make_plan(from_record(config, "science")), Path(config["run"]["dir"])
    conduct(plan, RunDir(root), ForkedJobs(lane(), ranks=1), Wanted(**wanted), Unwatched(), lambda *seen: None)
    facts = json.loads((root / "forgetting.json").read_bytes())
    logs = sorted(root.glob("phase*/logs/train.jsonl"))
    facts["tokens"] = [json.loads(path.read_text().splitlines()[-1])["tokens_seen"] for path in logs]
    return dict(facts)


def branched(trunk: str, folder: str) -> str:
    """A run that goes on from where another one has come to."""
    shutil.copytree(trunk, folder)
    return folder


_lane: list[Zygote] = []


def lane() -> Zygote:
    return _lane[0]


def open_lane(folder: str) -> None:
    os.chdir(folder)
    _lane.append(Zygote())


# The three questions --------------------------------------------------------------------------------------------------


def base_of(seed: int) -> Facts:
    """The trunk of all runs of a seed: home is learnt, and north is planned."""
    return ran(config(f"base-{seed}", seed, [at_home(), phase(NEW)]), last=HOME)


def replayed(seed: int, kind: str, share: float) -> Facts:
    folder = branched(f"base-{seed}", f"replay-{seed}-{kind}-{share}")
    new = phase(NEW, **how(kind), **({"replay": share} if share else {}))
    # One control for all three: it has the same start, steps and rates, and none of it is new.
    return ran(config(folder, seed, [at_home(), new]), control=not share)


def on_base(seed: int, folder: str, phases: Sequence[Config], **sections: Any) -> Config:
    """A run that begins with what was learnt at home, as one begins with a model of the hub."""
    model = {"name": f"base-{seed}/phase1_{HOME}/best_model", "tokenizer": "tokenizer", "precision": "fp32"}
    return config(folder, seed, phases, model=model, **{"general": (HOME,), **sections})


def chain(handover: str, **training: Any) -> list[Config]:
    first = phase(NEW, **how("LoRA"), handover=handover)
    return [first, *(phase(name, **how("LoRA", **training), handover=handover) for name in LATER)]


def first_of(seed: int, kind: str) -> Facts:
    """The first of three phases: the trunk of the handovers, and what is swept."""
    phases = [phase(NEW, **how(kind)), *chain("continue", optimizer_at_start="carry")[1:]]
    return ran(on_base(seed, f"first-{seed}-{kind}", phases if kind == "LoRA" else phases[:1]), last=NEW)


HANDOVERS: dict[str, Callable[[], list[Config]]] = {
    "continue": partial(chain, "continue"),
    "merge": partial(chain, "merge"),
    "stack": partial(chain, "stack"),
    "continue, optimizer carried": partial(chain, "continue", optimizer_at_start="carry"),
    "continue, no warm-up": partial(chain, "continue", warmup_ratio=0.0),
}
AT_ONCE = "all three in one phase"


def handed_over(seed: int, policy: str) -> Facts:
    folder = branched(f"first-{seed}-LoRA", f"handover-{seed}-{policy}")
    return ran(on_base(seed, folder, HANDOVERS[policy]()))


def at_once(seed: int) -> Facts:
    names = (NEW, *LATER)
    whole = phase("all", max_steps=len(names) * STEPS["phase"], **how("LoRA"))
    files = {key: [f"data/{name}{end}.jsonl" for name in names] for key, end in (("sources", ""), ("eval_sources", "_held_out"))}
    return ran(on_base(seed, f"at-once-{seed}", [whole | files], general=(HOME, *names)))


def swept(seed: int, kind: str) -> list[Facts]:
    """`phased-cpt sweep-lambda` of the first phase, by a function of it."""
    folder = Path(f"swept-{seed}-{kind}")
    folder.mkdir()
    where = str(Path(f"first-{seed}-{kind}").absolute())
    return list(lane().call("benchmarks.science:sweep", where, folder=folder))


def sweep(run: str) -> list[Facts]:
    """In a forked process, which has torch."""
    from phased_cpt.evaluate.sweep import swept
    from phased_cpt.wanted import ModelsWanted, SweepWanted

    return list(swept(SweepWanted(ModelsWanted(Path(run)), NEW, STRENGTHS))["strengths"])


# All of them ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One run of a seed, by the name of what it answers."""

    key: tuple[str, ...]
    run: Callable[[int], Any]


BASES = [Task(("base",), base_of)]
REPLAYS = [
    Task(("replay", kind, str(share)), partial(replayed, kind=kind, share=share))
    for kind in ("every weight", "LoRA")
    for share in SHARES
]
FIRSTS = [Task(("first", kind), partial(first_of, kind=kind)) for kind in ("LoRA", "every weight")]
LAST = [
    Task(("handover", AT_ONCE), at_once),
    *(Task(("handover", policy), partial(handed_over, policy=policy)) for policy in HANDOVERS),
    *(Task(("sweep", kind), partial(swept, kind=kind)) for kind in ("LoRA", "every weight")),
]


@dataclass(frozen=True)
class Found:
    """What came out, by task and seed."""

    seeds: Sequence[int]
    by_key: dict[tuple[str, ...], list[Any]]

    def of(self, *key: str) -> list[Any]:
        return self.by_key[key]


def timed(task: Task, seed: int) -> tuple[Any, float]:
    began = time.monotonic()
    return task.run(seed), time.monotonic() - began


def all_of(seeds: Sequence[int], folder: Path) -> Found:
    found: dict[tuple[str, ...], list[Any]] = {}
    began, done = time.monotonic(), 0
    with ProcessPoolExecutor(LANES, get_context("spawn"), open_lane, (str(folder),)) as lanes:
        for tasks in (BASES, [*FIRSTS, *REPLAYS], LAST):
            under_way = [(task, seed, lanes.submit(timed, task, seed)) for task in tasks for seed in seeds]
            for task, seed, result in under_way:
                facts, seconds = result.result()
                found.setdefault(task.key, []).append(facts)
                done += 1
                of, name = len(seeds) * len([*BASES, *REPLAYS, *FIRSTS, *LAST]), ", ".join(task.key)
                tell(f"{time.monotonic() - began:5.0f} s  {done}/{of}  {name}, seed {seed}: {seconds:.1f} s")
    return Found(seeds, found)


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
