"""Adapters on top of each other, each as strong as is asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from phased_cpt.data.watch import Unwatched
from phased_cpt.errors import InputError
from phased_cpt.merge.story import merge
from tests.merge.conftest import Making
from tests.merge.kinds import EXACT, apart, job, logits, plain, tensors, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Others than `plain` has, and of another rank; one layer is changed by both.
SECOND = {"target_modules": ["down_proj", "o_proj"], "r": 2, "lora_alpha": 6}


def stacked(base: Path, *adapters: tuple[Path, float]) -> Any:
    """PEFT's own model with all of them live."""
    model: Any = None
    for at, (folder, _) in enumerate(adapters):
        if model is None:
            model = PeftModel.from_pretrained(plain(base), folder, f"adapter_{at}")
        else:
            model.load_adapter(folder, f"adapter_{at}")
    model.base_model.set_adapter([f"adapter_{at}" for at in range(len(adapters))])
    for layer in model.modules():
        for at, (_, scale) in enumerate(adapters):
            if isinstance(layer, LoraLayer) and f"adapter_{at}" in layer.scaling:
                layer.scaling[f"adapter_{at}"] *= scale
    return model.eval()


@pytest.mark.requirement("M-01")
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 0.5), (2.0, -1.0)])
@pytest.mark.parametrize("kind", ["plain", "experts", "tied, embeddings", "GPT-2's Conv1D"])
def test_two_adapters_are_both_in_it(kind: str, scales: tuple[float, float], made: Making, output: Path, tmp_path: Path) -> None:  # fmt: skip
    it = made(kind)
    targets = {"GPT-2's Conv1D": ["c_fc", "c_attn"], "experts": ["q_proj", "o_proj"]}.get(kind)
    second = write_adapter(tmp_path / "second", it.base, 2, **SECOND | ({"target_modules": targets} if targets else {}))
    both = [(it.adapter, scales[0]), (second, scales[1])]
    merge(job(it.base, [folder for folder, _ in both], output, scales=dict(both)), Unwatched())
    expected = logits(stacked(it.base, *both))
    assert apart(logits(plain(output)), expected) <= EXACT
    assert apart(logits(it.live()), expected) > 1e-3, "the control: the second changes something, too"
    if scales != (1.0, 1.0):
        assert apart(logits(stacked(it.base, *((folder, 1.0) for folder, _ in both))), expected) > 1e-3, "its strength"


def test_a_layer_that_two_adapters_change_gets_the_sum_by_hand(made: Making, output: Path, tmp_path: Path) -> None:
    it = made("plain")
    second = write_adapter(tmp_path / "second", it.base, 2, **SECOND)
    merge(job(it.base, [it.adapter, second], output, scales={second: 0.5}), Unwatched())
    name = "model.layers.1.mlp.down_proj"
    expected = tensors(it.base)[f"{name}.weight"].double()
    for folder, strength in ((it.adapter, 8 / 4), (second, 6 / 2 * 0.5)):
        saved = tensors(folder)
        a, b = (saved[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        expected += strength * b @ a
    found = tensors(output)[f"{name}.weight"].double()
    assert float((found - expected).abs().max()) < 1e-7
    assert float((found - tensors(it.base)[f"{name}.weight"]).abs().max()) > 1e-3


def test_one_after_the_other_is_the_same_as_both_at_once(made: Making, output: Path, tmp_path: Path) -> None:
    it = made("plain")
    second = write_adapter(tmp_path / "second", it.base, 2, **SECOND)
    merge(job(it.base, [it.adapter, second], output), Unwatched())
    merge(job(it.base, it.adapter, tmp_path / "first"), Unwatched())
    merge(job(tmp_path / "first", second, tmp_path / "both"), Unwatched())
    one, other = tensors(output), tensors(tmp_path / "both")
    assert max(float((one[name] - other[name]).abs().max()) for name in other) <= 1e-6


def test_the_same_adapter_twice_is_twice_as_strong(made: Making, output: Path, tmp_path: Path) -> None:
    it = made("plain")
    merge(job(it.base, [it.adapter, it.adapter], output), Unwatched())
    merge(job(it.base, it.adapter, tmp_path / "two", scales={it.adapter: 2.0}), Unwatched())
    one, other = tensors(output), tensors(tmp_path / "two")
    assert max(float((one[name] - other[name]).abs().max()) for name in other) <= 1e-6


@pytest.mark.parametrize("kind, words", [("DoRA", "one is DoRA"), ("two tokens", "one is of tokens")])
@pytest.mark.parametrize("first", [True, False])
def test_what_hangs_on_the_layers_below_it_is_refused_in_a_stack(
    kind: str, words: str, first: bool, made: Making, output: Path
) -> None:
    """Alone it is merged."""
    both = [made("plain").adapter, made(kind).adapter][:: -1 if first else 1]
    with pytest.raises(InputError, match=rf"{words}.*one after the other"):
        merge(job(made("plain").base, both, output), Unwatched())
    assert not list(output.parent.iterdir())


WHOLE = ["both embeddings whole", "a norm whole", "every bias"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", WHOLE)
def test_an_adapter_with_weights_of_its_own_may_be_one_of_two(
    kind: str, first: bool, made: Making, output: Path, tmp_path: Path
) -> None:
    it = made(kind)
    both = [it.adapter, write_adapter(tmp_path / "second", it.base, 2, **SECOND)][:: 1 if first else -1]
    merge(job(it.base, both, output), Unwatched())
    expected = logits(stacked(it.base, *((folder, 1.0) for folder in both)))
    assert apart(logits(plain(output)), expected) <= EXACT
    assert apart(logits(it.live()), expected) > 1e-3, "the control: the other changes something, too"


@pytest.mark.parametrize("kind", [*WHOLE, "two tokens"])
def test_two_adapters_that_replace_the_same_weights_are_refused(kind: str, made: Making, output: Path) -> None:
    it = made(kind)
    with pytest.raises(InputError) as refused:
        merge(job(it.base, [it.adapter, it.adapter], output), Unwatched())
    assert str(it.adapter) in str(refused.value) and "\n" not in str(refused.value)
    assert not list(output.parent.iterdir())


def test_a_scale_of_nothing_is_the_base(made: Making, output: Path) -> None:
    it = made("plain")
    merge(job(it.base, it.adapter, output, scales={it.adapter: 0.0}), Unwatched())
    found, base = tensors(output), tensors(it.base)
    assert all(torch.equal(found[name], base[name]) for name in base)
