"""A phased_cpt that plays one, and the smallest run of the real one."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SAMPLE, TOKENIZER
from tests.launch.programs import Stage

Small = Callable[[int], dict[str, str]]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """In a folder of its own, run.json with one phase of so many steps on one process; its environment is returned."""
    here = tmp_path / "a small run"
    here.mkdir()
    monkeypatch.chdir(here)
    shape = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip

    def written(steps: int) -> dict[str, str]:
        config = {
            "run": {"name": "small", "cache_dir": "cache"},
            "model": {"from_config": shape, "tokenizer": str(TOKENIZER), "precision": "fp32"},
            "lora": {"r": 4, "alpha": 8, "target_modules": "auto"},
            "data": {"max_tokens": 128, "overlap_tokens": 16, "eval_share": 0.0},
            "training": {"micro_batch_size": 2, "global_batch_size": 4, "deepspeed": "zero2"},
            "merge": {"enabled": False},
            "launch": {"num_gpus": 1},
            "phases": [{"name": "one", "sources": str(SAMPLE / "phase1_foundation.jsonl"), "max_steps": steps}],
        }
        Path("run.json").write_text(json.dumps(config))
        return {
            "PATH": "/usr/bin:/bin", "VIRTUAL_ENV": sys.prefix, "HOME": str(here), "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    return written
