"""A run of two phases that have learned much in little: each answers in its own words."""

from pathlib import Path

from phased_cpt.conductor import conduct
from phased_cpt.config import from_record
from phased_cpt.data.watch import Unwatched
from phased_cpt.plan import Wanted, make_plan
from phased_cpt.run_dir import RunDir
from tests.conftest import SAMPLE, TOKENIZER
from tests.zygote import ForkedJobs, Zygote

SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip


def trained_run(zygote: Zygote, folder: Path) -> Path:
    """base ─ foundation ─ evolution, in a few seconds."""
    config = {
        "run": {"name": "tiny", "dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        "model": {"from_config": SHAPE, "tokenizer": str(TOKENIZER), "precision": "fp32"},
        "lora": {"r": 4, "alpha": 8, "target_modules": "auto"},
        "data": {"max_tokens": 128, "overlap_tokens": 16, "eval_share": 0.1, "eval_max_tokens": 1000},
        "training": {"micro_batch_size": 8, "global_batch_size": 8, "learning_rate": 0.05, "warmup_steps": 1, "deepspeed": "zero2"},
        "evaluation": {"every_steps": 4},
        "merge": {"enabled": False},
        "phases": [
            {"name": "foundation", "sources": str(SAMPLE / "phase1_foundation.jsonl"), "max_steps": 4},
            {"name": "evolution", "sources": str(SAMPLE / "phase2_evolution.jsonl"), "max_steps": 4},
        ],
    }  # fmt: skip
    plan = make_plan(from_record(config, "test"))
    run = RunDir(folder / "run")
    conduct(plan, run, ForkedJobs(zygote, 1), Wanted(), Unwatched(), lambda *seen: None)
    return run.root
