"""Whole runs of a tiny model, in seconds."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.conductor import Door, Outcome, conduct
from phased_cpt.config import from_record
from phased_cpt.data.watch import Unwatched
from phased_cpt.plan import Plan, Wanted, make_plan
from phased_cpt.run_dir import RunDir
from tests.conftest import SAMPLE, TOKENIZER
from tests.zygote import ForkedJobs, Zygote

SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
# A tiny model is kept whole under ZeRO-3 unless this is 0, and nothing would be tested.
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
PHASES = {"foundation": "phase1_foundation", "evolution": "phase2_evolution", "pr_mastery": "phase3_pr_mastery"}

Tiny = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same few tokens for every run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_cache: Path) -> Tiny:
    """A run of three phases, four steps each; sections are merged over it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO3))
    offload = {"zero_optimization": {**ZERO3["zero_optimization"], "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "offload.json").write_text(json.dumps(offload))
    (tmp_path / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))

    def made(**sections: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "run": {"name": "tiny", "dir": "run", "cache_dir": str(data_cache)},
            "model": {"from_config": SHAPE, "tokenizer": str(TOKENIZER), "precision": "fp32"},
            "lora": {"r": 4, "alpha": 8, "target_modules": "auto"},
            "data": {"max_tokens": 128, "overlap_tokens": 16, "eval_share": 0.1, "eval_max_tokens": 2000},
            "training": {
                "micro_batch_size": 2, "global_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1,
                "deepspeed": "zero2",
            },
            "evaluation": {"every_steps": 2, "micro_batch_size": 4},
            "merge": {"enabled": False},
            "phases": [
                {"name": name, "sources": str(SAMPLE / f"{stem}.jsonl"), "max_steps": 4} for name, stem in PHASES.items()
            ],
        }  # fmt: skip
        for name, section in sections.items():
            config[name] = {**config[name], **section} if isinstance(section, dict) and name in config else section
        return config

    return made


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    running = Zygote()
    yield running
    running.close()


Ran = Callable[..., Outcome]


@pytest.fixture
def ran(zygote: Zygote) -> Ran:
    """A configuration, run in forked ranks."""

    def run(config: dict[str, Any], ranks: int = 2, door: Door | None = None, **wanted: Any) -> Outcome:
        plan = planned(config)
        folder = RunDir(Path(config["run"]["dir"]))
        return conduct(
            plan, folder, door or ForkedJobs(zygote, ranks), Wanted(**wanted), Unwatched(), lambda *seen: None
        )

    return run


def planned(config: dict[str, Any]) -> Plan:
    return make_plan(from_record(config, "test"))


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
