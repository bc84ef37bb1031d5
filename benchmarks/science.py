"""What replay, handovers and shrinking do to a tiny model: curricula of made-up languages, through the real engine.

    make bench-science                                          three seeds; 22 minutes beside other work
    .venv/bin/python benchmarks/science.py --quick              one seed, no intervals

random ─ home, every weight ─┬─ north or coast, with 0, 5, 25 % of home ── control: home again      1 replay
                             ├─ coast ─ hills ─ plain, by each handover; all three at once          2 handover
                             └─ home + λ · what north or coast has changed                          3 λ-sweep

A seed draws the first weights, the adapters and the order of the rows; texts stay, and held-out documents, which are
files of their own. Two runs at a time, of one rank each, forked from a process that has imported all (tests/zygote).
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for the two imports of what is no package, here and in the forked ranks

from benchmarks.science_languages import write_languages  # noqa: E402
from benchmarks.science_tables import handover_table, interval, loss, replay_table, seed_by_seed, sweep_table  # noqa: E402
from phased_cpt.conductor import conduct  # noqa: E402
from phased_cpt.config import from_record  # noqa: E402
from phased_cpt.data.train_tokenizer import train_tokenizer  # noqa: E402
from phased_cpt.data.watch import Unwatched  # noqa: E402
from phased_cpt.plan import Wanted, make_plan  # noqa: E402
from phased_cpt.run_dir import RunDir  # noqa: E402
from tests.zygote import ForkedJobs, Zygote  # noqa: E402

SEEDS, LANES = (1, 2, 3), 2
VOCABULARY = 768
SHAPE = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 192,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LORA, WHOLE = "LoRA", "every weight"
HOME, FOREIGN, DIALECTS = "home", "north", ("coast", "hills", "plain")
NEW = (FOREIGN, DIALECTS[0])
STEPS = {HOME: 400, "phase": 150}  # of 16 rows of 128 tokens
# At seed 0, which is none of those that are told: of 2, 4, 8, 16e-3 for every weight and of 5, 10, 20e-3 for LoRA, the
# lowest whose loss on the new is within 0.05 nats of the best.
RATES = {HOME: 5e-3, WHOLE: 8e-3, LORA: 1e-2}
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
    return {"lora": {"enabled": kind == LORA}, "training": {"learning_rate": RATES[kind], **more}}


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
    """The trunk of all runs of a seed: home is learnt, and another is planned."""
    return ran(config(f"base-{seed}", seed, [at_home(), phase(FOREIGN)]), last=HOME)


def replayed(seed: int, new: str, kind: str, share: float) -> Facts:
    folder = branched(f"base-{seed}", f"replay-{seed}-{new}-{kind}-{share}")
    phases = [at_home(), phase(new, **how(kind), **({"replay": share} if share else {}))]
    # One control for all three: it has the same start, steps and rates, and none of it is new.
    return ran(config(folder, seed, phases), control=not share)


def on_base(seed: int, folder: str, phases: Sequence[Config], **sections: Any) -> Config:
    """A run that begins with what was learnt at home, as one begins with a model of the hub."""
    model = {"name": f"base-{seed}/phase1_{HOME}/best_model", "tokenizer": "tokenizer", "precision": "fp32"}
    return config(folder, seed, phases, model=model, **{"general": (HOME,), **sections})


def chain(handover: str, kind: str = LORA, replay: float = 0.0, **training: Any) -> list[Config]:
    """The dialects; what is special about a chain begins with the second."""
    first = phase(DIALECTS[0], **how(kind), handover=handover)
    more = {"handover": handover} | ({"replay": replay} if replay else {})
    return [first, *(phase(name, **how(kind, **training), **more) for name in DIALECTS[1:])]


def first_of(seed: int, new: str, kind: str) -> Facts:
    """On the base alone: what is swept, and the trunk of the handovers."""
    planned = chain("continue", kind, optimizer_at_start="carry")  # or else what it knew would not be kept
    phases = planned if new == DIALECTS[0] else [phase(new, **how(kind))]
    return ran(on_base(seed, f"first-{seed}-{new}-{kind}", phases), last=new)


HANDOVERS: dict[str, tuple[str, Callable[[], list[Config]]]] = {
    "continue": (LORA, partial(chain, "continue")),
    "merge": (LORA, partial(chain, "merge")),
    "stack": (LORA, partial(chain, "stack")),
    "continue, optimizer carried": (LORA, partial(chain, "continue", optimizer_at_start="carry")),
    "continue, no warm-up": (LORA, partial(chain, "continue", warmup_ratio=0.0)),
    "continue, 5 % replay": (LORA, partial(chain, "continue", replay=0.05)),
    "every weight": (WHOLE, partial(chain, "continue", WHOLE)),
}
AT_ONCE = "LoRA, all three in one phase"


def handed_over(seed: int, policy: str) -> Facts:
    kind, phases = HANDOVERS[policy]
    folder = branched(f"first-{seed}-{DIALECTS[0]}-{kind}", f"handover-{seed}-{policy}")
    return ran(on_base(seed, folder, phases()))


def at_once(seed: int) -> Facts:
    names = DIALECTS
    whole = phase("all", max_steps=len(names) * STEPS["phase"], **how(LORA))
    files = {
        key: [f"data/{name}{end}.jsonl" for name in names]
        for key, end in (("sources", ""), ("eval_sources", "_held_out"))
    }
    return ran(on_base(seed, f"at-once-{seed}", [whole | files], general=(HOME, *names)))


def swept(seed: int, new: str, kind: str) -> list[Facts]:
    """`phased-cpt sweep-lambda` of the first phase, by a function of it."""
    folder = Path(f"swept-{seed}-{new}-{kind}")
    folder.mkdir()
    where = str(Path(f"first-{seed}-{new}-{kind}").absolute())
    return list(lane().call("benchmarks.science:sweep", where, new, folder=folder))


def sweep(run: str, new: str) -> list[Facts]:
    """In a forked process, which has torch."""
    from phased_cpt.evaluate.sweep import swept
    from phased_cpt.wanted import ModelsWanted, SweepWanted

    return list(swept(SweepWanted(ModelsWanted(Path(run)), new, STRENGTHS))["strengths"])


# All of them ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One run of a seed, by the name of what it answers."""

    key: tuple[str, ...]
    run: Callable[[int], Any]


BASES = [Task(("base",), base_of)]
PAIRS = [(new, kind) for new in NEW for kind in (WHOLE, LORA)]
REPLAYS = [
    Task(("replay", new, kind, str(share)), partial(replayed, new=new, kind=kind, share=share))
    for new, kind in PAIRS
    for share in SHARES
]
FIRSTS = [Task(("first", new, kind), partial(first_of, new=new, kind=kind)) for new, kind in PAIRS]
LAST = [
    Task(("handover", AT_ONCE), at_once),
    *(Task(("handover", policy), partial(handed_over, policy=policy)) for policy in HANDOVERS),
    *(Task(("sweep", new, kind), partial(swept, new=new, kind=kind)) for new, kind in PAIRS),
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
    """Each of the three lists needs what the one before has left."""
    found: dict[tuple[str, ...], list[Any]] = {}
    began, done, of = time.monotonic(), 0, len(seeds) * len([*BASES, *FIRSTS, *REPLAYS, *LAST])
    with ProcessPoolExecutor(LANES, get_context("spawn"), open_lane, (str(folder),)) as lanes:
        for tasks in (BASES, [*FIRSTS, *REPLAYS], LAST):
            under_way = {lanes.submit(timed, task, seed): (task.key, seed) for task in tasks for seed in seeds}
            for each in as_completed(under_way):
                (key, seed), (_, seconds), done = under_way[each], each.result(), done + 1
                name = ", ".join(key)
                tell(f"{time.monotonic() - began:5.0f} s  {done}/{of}  {name}, seed {seed}: {seconds:.1f} s")
            for each, (key, _) in under_way.items():
                found.setdefault(key, []).append(each.result()[0])
    return Found(seeds, found)


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# Told -----------------------------------------------------------------------------------------------------------------


def told(found: Found, folder: Path, seconds: float) -> None:
    """When and where, what the base has learnt, and the tables."""
    packages = ("torch", "transformers", "deepspeed", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    texts = b"".join(path.read_bytes() for path in sorted((folder / "data").iterdir()))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {versions}; {seconds:.0f} s; ", end="")
    print(f"seeds {', '.join(map(str, found.seeds))}; texts sha256 {hashlib.sha256(texts).hexdigest()[:12]}\n")
    base = found.of("base")
    random, home = (interval(seed_by_seed(base, loss(at, HOME))) for at in (0, 1))
    print(f"{HOME}: {random} with random weights, {home} once it is learnt\n")
    replays = {
        (new, kind): {share: found.of("replay", new, kind, str(share)) for share in SHARES} for new, kind in PAIRS
    }
    firsts = {(new, kind): found.of("first", new, kind) for new, kind in PAIRS}
    print(replay_table(replays, firsts, HOME))
    policies = {name: found.of("handover", name) for name in (*HANDOVERS, AT_ONCE)}
    print(handover_table(policies, DIALECTS, HOME))
    print(sweep_table({(new, kind): found.of("sweep", new, kind) for new, kind in PAIRS}, HOME))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--quick", action="store_true", help="one seed, so no intervals")
    words.add_argument(
        "--keep", type=Path, metavar="DIR", help="a new folder for the runs, and what was found in found.json"
    )
    asked, began = words.parse_args(), time.monotonic()
    with contextlib.ExitStack() as leaving:
        folder = asked.keep.resolve() if asked.keep else Path(leaving.enter_context(tempfile.TemporaryDirectory()))
        (folder / "data").mkdir(parents=True)
        write_languages(folder / "data")
        train_tokenizer([str(folder / "data/*.jsonl")], folder / "tokenizer", VOCABULARY, tell=tell)
        found = all_of(SEEDS[:1] if asked.quick else SEEDS, folder)
        written = {", ".join(key): runs for key, runs in found.by_key.items()}
        (folder / "found.json").write_text(json.dumps(written, indent=1) + "\n")
        told(found, folder, time.monotonic() - began)


if __name__ == "__main__":
    main()
