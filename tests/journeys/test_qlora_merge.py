"""A QLoRA curriculum from its first step to the merged model: what was trained is what is written."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from phased_cpt.evals.heldout import measuring
from phased_cpt.model.reload import load_published
from tests.journeys.conftest import Ran, Tiny

IDS = torch.arange(96)[None] * 37 % 4096


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad(), measuring(model):  # a CPU packs 4-bit weights anew in eval mode
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.requirement("M-01", "M-04", "L-01")
def test_a_qlora_curriculum_ends_in_the_model_that_it_trained(tiny: Tiny, ran: Ran) -> None:
    config = tiny(model={"use_4bit": True}, merge={"enabled": True, "base": "dequantized"})
    ran(config | {"phases": config["phases"][:2]})
    facts = json.loads(Path("run/merged_model/merge.json").read_text())
    assert facts["base_choice"]["kind"] == "dequantized" and facts["merged"] == 14
    assert facts["logits"]["of"] == "held-out documents" and facts["logits"]["relative"] < 1e-5

    merged = logits(AutoModelForCausalLM.from_pretrained("run/merged_model"))
    trained = logits(load_published("run")[0])
    before = logits(load_published("run", "foundation")[0])
    assert float((merged - trained).abs().max()) < 1e-4 * float(trained.abs().max())
    assert float((merged - before).abs().max()) > 1e-2 * float(trained.abs().max()), "the control: an earlier phase"

    ran(config | {"phases": config["phases"][:2], "merge": {"enabled": True, "base": "auto"}})
    measured = json.loads(Path("run/merged_model/merge.json").read_text())["base_choice"]
    losses = measured["held_out_loss"]
    assert measured["kind"] == min(losses, key=losses.__getitem__) and measured["windows"] > 2
