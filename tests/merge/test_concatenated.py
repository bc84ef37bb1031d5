"""Several adapters as one: their sum to the last digits, which the mean of their factors is not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from phased_cpt.errors import InputError
from phased_cpt.merge.concatenated import concatenated
from phased_cpt.published import source_of, weights_digest
from tests.merge.conftest import Making
from tests.merge.kinds import job, logits, plain, tensors, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SAME = {"target_modules": ["q_proj", "down_proj"]}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alike": (SAME, SAME),
    "of another rank and alpha": (SAME | {"r": 4, "lora_alpha": 8}, SAME | {"r": 2, "lora_alpha": 6}),
    "rsLoRA": (SAME | {"r": 4, "lora_alpha": 4, "use_rslora": True}, SAME | {"r": 2, "lora_alpha": 6}),
    "on other layers": (SAME, {"target_modules": ["down_proj", "o_proj"], "r": 2, "lora_alpha": 6}),
    "by patterns": (SAME | {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 3}}, SAME),
}


def deltas(model: Any, adapter: str) -> dict[str, Tensor]:
    """What an adapter adds to each layer, by PEFT's own account."""
    layers = ((name, each) for name, each in model.named_modules() if isinstance(each, LoraLayer))
    return {name: each.get_delta_weight(adapter) for name, each in layers if adapter in each.lora_A}  # type: ignore[operator]


def summed(model: Any, weights: dict[str, float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for adapter, weight in weights.items():
        for name, each in deltas(model, adapter).items():
            found[name] = found.get(name, torch.zeros_like(each)) + weight * each
    return found


def most(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in other)


@pytest.mark.requirement("M-01")
@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, -0.5)])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_sum_is_exact_and_loads_with_plain_peft(
    pair: str, weights: tuple[float, float], made: Making, tmp_path: Path
) -> None:
    base = made("plain").base
    folders = [write_adapter(tmp_path / f"{at}", base, at, **lora) for at, lora in enumerate(PAIRS[pair], 1)]
    facts = concatenated(job(base, folders, tmp_path / "soup", scales=dict(zip(folders, weights, strict=True))))

    alone: Any = PeftModel.from_pretrained(plain(base), folders[0], "one")
    alone.load_adapter(folders[1], "two")
    wanted = summed(alone, dict(zip(("one", "two"), weights, strict=True)))
    soup: Any = PeftModel.from_pretrained(plain(base), tmp_path / "soup")
    assert most(deltas(soup, "default"), wanted) <= 1e-6
    assert most(deltas(soup, "default"), summed(alone, {"one": 0.5, "two": 0.5})) > 0.1, "the control: other weights"
    assert {path.name for path in (tmp_path / "soup").glob("*")} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert facts["rank"] == max(len(each) for name, each in tensors(tmp_path / "soup").items() if "lora_A" in name)


@pytest.mark.requirement("M-01")
def test_it_is_what_peft_calls_cat_and_not_what_it_calls_linear(made: Making, tmp_path: Path) -> None:
    """METHODS.md 8, T7: the mean of A's times the mean of B's has half of each product, and products of strangers."""
    base = made("plain").base
    folders = [write_adapter(tmp_path / name, base, seed, **SAME) for seed, name in enumerate(("one", "two"), 1)]
    model: Any = PeftModel.from_pretrained(plain(base), folders[0], "one")
    model.load_adapter(folders[1], "two")
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], kind, combination_type=kind)
    concatenated(job(base, folders, tmp_path / "soup", scales=dict.fromkeys(folders, 0.5)))
    model.load_adapter(tmp_path / "soup", "ours")
    assert most(deltas(model, "ours"), deltas(model, "cat")) <= 1e-6
    assert most(deltas(model, "ours"), summed(model, {"one": 0.5, "two": 0.5})) <= 1e-6
    assert most(deltas(model, "linear"), deltas(model, "cat")) > 0.1


def test_it_says_what_it_is_made_of_and_stands_on(made: Making, tmp_path: Path) -> None:
    it = made("plain")
    facts = concatenated(job(it.base, [it.adapter, it.adapter], tmp_path / "soup", scales={it.adapter: 0.25}))
    source = source_of(tmp_path / "soup")
    assert source is not None and source.base == weights_digest(it.base) and facts["rank"] == 8
    assert source.why == facts["made_of"] == " + ".join(["0.25 × " + "/".join(it.adapter.parts[-2:])] * 2)
    half: Any = PeftModel.from_pretrained(plain(it.base), it.adapter)
    for layer in half.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= 0.5
    soup = PeftModel.from_pretrained(plain(it.base), tmp_path / "soup").eval()
    assert torch.allclose(logits(soup), logits(half.eval()), atol=1e-6)


@pytest.mark.parametrize("kind", ["experts", "LoRA with a bias", "embeddings", "DoRA"])
def test_what_is_more_than_factors_is_sent_to_the_merge(kind: str, made: Making, tmp_path: Path) -> None:
    it = made(kind)
    with pytest.raises(InputError, match=r"leave --adapter-only out"):
        concatenated(job(it.base, it.adapter, tmp_path / "soup"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(made: Making, tmp_path: Path) -> None:
    it = made("plain")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(InputError, match="there is something already"):
        concatenated(job(it.base, it.adapter, tmp_path / "mine"))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
