"""Three phases with real DeepSpeed on the CPU: each starts from what the one before has published."""

import json
from pathlib import Path

import pytest

from tests.journeys.conftest import Ran, Tiny, lines

KINDS = {
    "LoRA, ZeRO-2": {},
    "LoRA, ZeRO-3": {"training": {"deepspeed": "zero3.json"}},
    "QLoRA, ZeRO-2": {"model": {"use_4bit": True, "precision": "bf16"}},
    "QLoRA, ZeRO-3": {"model": {"use_4bit": True, "precision": "bf16"}, "training": {"deepspeed": "zero3.json"}},
}


@pytest.mark.requirement("S-01", "L-01")
@pytest.mark.parametrize("kind", KINDS)
def test_a_curriculum_runs(kind: str, tiny: Tiny, ran: Ran) -> None:
    outcome = ran(tiny(**KINDS[kind]))
    assert outcome.finished
    assert outcome.trained == ("foundation", "evolution", "pr_mastery")
    run = outcome.run_dir.root
    for phase in outcome.plan.phases:
        source = json.loads((run / phase.folder / "best_adapter/source.json").read_text())
        assert source["end"]["eval_loss"] < source["start"]["eval_loss"], "it learnt"
        assert [line["step"] for line in lines(run / phase.folder / "logs/train.jsonl")] == [1, 2, 3, 4]
    assert Path("run/final_model/adapter_model.safetensors").exists()
