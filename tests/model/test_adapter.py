"""A fresh adapter as the plan wants it: its scale, its kind, and first weights that leave the base as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from phased_cpt.config import Lora
from phased_cpt.model.adapter import adapt, described
from tests.model.test_base import IDS, base, loaded  # noqa: F401 - a fixture


def adapted(folder: Path, precision: str = "fp32", **lora: Any) -> Any:
    how = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto", **lora}
    return adapt(loaded(folder, precision), None, Lora.model_validate(how), seed=5).eval()


@pytest.mark.parametrize(
    ("lora", "scale", "words"),
    [
        ({}, 2.0, "LoRA of rank 4, scaled by 2"),
        ({"use_rslora": True}, 4.0, "rsLoRA of rank 4, scaled by 4"),
        ({"use_rslora": True, "use_dora": True, "r": 16, "alpha": 6}, 1.5, "rsDoRA of rank 16, scaled by 1.5"),
    ],
)
def test_what_the_plan_calls_its_scale_is_what_peft_multiplies_with(
    base: Path,  # noqa: F811
    lora: dict[str, Any],
    scale: float,
    words: str,
) -> None:
    model = adapted(base, **lora)
    scales = {layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)}
    assert scales == {Lora.model_validate({"r": 4, "alpha": 8, **lora}).scale} == {scale}
    assert described(model) == words


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [{}, {"init": "gaussian"}, {"use_dora": True}, {"use_dora": True, "init": "gaussian"}])
@torch.no_grad()
def test_an_adapter_begins_by_saying_nothing(base: Path, lora: dict[str, Any], precision: str) -> None:  # noqa: F811
    before = loaded(base, precision).eval()(IDS).logits
    model = adapted(base, precision, **lora)
    assert torch.equal(model(IDS).logits, before)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight += 0.1
    assert not torch.equal(model(IDS).logits, before), "the control: it is in use"


@torch.no_grad()
def test_an_orthogonal_adapter_says_nothing_but_for_rounding(base: Path) -> None:  # noqa: F811
    """Its B is not zero: B·A is, in numbers that are not rounded. In bf16 it is about 1 % of a weight, and told."""
    off = {}
    for precision in ("fp32", "bf16"):
        layer = adapted(base, precision, r=16, init="orthogonal").base_model.model.model.layers[0].self_attn.q_proj
        assert layer.lora_B["default"].weight.any()
        off[precision] = float(layer.get_delta_weight("default").norm() / layer.base_layer.weight.norm())
    assert off["fp32"] < 1e-5 < 3e-4 < off["bf16"] < 0.1


def test_the_ways_to_begin_differ_and_come_out_the_same_again(base: Path) -> None:  # noqa: F811
    def a(init: str) -> torch.Tensor:
        layer = adapted(base, init=init).base_model.model.model.layers[0].self_attn.q_proj
        return layer.lora_A["default"].weight.detach().clone()

    drawn = {init: a(init) for init in ("default", "gaussian", "orthogonal")}
    assert all(torch.equal(a(init), weight) for init, weight in drawn.items())
    assert not torch.equal(drawn["default"], drawn["gaussian"])
