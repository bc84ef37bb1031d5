"""What the child says of a model without weights."""

import json
import subprocess
from typing import Any

from phased_cpt.children import command
from tests.preflight.conftest import SHAPE


def asked(**more: Any) -> dict[str, Any]:
    question = {"model": SHAPE, "trust_remote_code": False, "attention": "auto", "precision": "fp32", "max_tokens": 64}
    child = subprocess.run(
        command("phased_cpt.probe"), input=json.dumps(question | more), capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(child.stdout)
    return answer


def test_an_architecture_whose_layers_have_other_names() -> None:
    shape = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    answer = asked(model=shape)
    assert answer["linears"] == ["c_attn", "c_fc", "c_proj"]
    assert answer["kernel"] == "sdpa"
    assert answer["devices"] == []
