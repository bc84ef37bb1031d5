"""The model of a phase, as it is loaded and written: nothing of it drawn at random unasked, and nothing left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from phased_cpt.config import Lora
from phased_cpt.errors import InputError
from phased_cpt.model.adapter import adapt
from phased_cpt.model.base import attentions, load_base, make_random_base
from phased_cpt.train.publish import require_sound, saved_names, write_weights

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **TINY},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, **TINY},
    "qwen3_moe": {"model_type": "qwen3_moe", **TINY, **EXPERTS},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip
IDS = torch.arange(40)[None]


def loaded(folder: Path, precision: str = "bf16", attention: str = "eager") -> PreTrainedModel:
    return load_base(
        folder, precision=precision, attention=attention, max_tokens=64, storage=None, trust_remote_code=False, tell=print
    )  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_random_base(tmp_path / "base", SHAPES["llama"], seed=1)
    return tmp_path / "base"


def of(model: torch.nn.Module, masters: dict[str, torch.Tensor]) -> list[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """As an engine would give them."""
    return [(name, weight, masters[name]) for name, weight in model.named_parameters() if name in masters]


@pytest.mark.parametrize("kind", SHAPES)
def test_a_model_that_is_trained_whole_is_written_whole_and_in_fp32(kind: str, tmp_path: Path) -> None:
    """Trained in bf16, of masters that are not: what plain transformers reads back are the masters."""
    make_random_base(tmp_path / "base", SHAPES[kind], seed=1)
    model = adapt(loaded(tmp_path / "base"), None, Lora(enabled=False), seed=1)
    torch.manual_seed(2)
    masters = {
        name: weight.detach().float() + 0.01 * torch.randn(weight.shape) for name, weight in model.named_parameters()
    }
    expected = {saved_names(model, list(masters))[name]: tuple(weight.shape) for name, weight in masters.items()}
    (tmp_path / "best_model").mkdir()
    write_weights(model, tmp_path / "best_model", writes=True, masters=of(model, masters))
    require_sound(tmp_path / "best_model", expected, {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "best_model", attn_implementation="eager")
    assert again.dtype == torch.float32
    assert all(torch.equal(weight, masters[name]) for name, weight in again.named_parameters())
    with torch.no_grad():
        got = again(IDS, use_cache=False).logits
        model.float().load_state_dict(masters, strict=False)
        assert torch.equal(got, model.eval()(IDS, use_cache=False).logits)
        assert not torch.equal(got, loaded(tmp_path / "base", "fp32").eval()(IDS, use_cache=False).logits)
    assert model.config.dtype == torch.bfloat16 or str(model.config.dtype) == "bfloat16", "the live model is as it was"


@pytest.mark.requirement("L-03")
@pytest.mark.parametrize("kind", SHAPES)
def test_auto_adapts_every_linear_layer_but_the_head(kind: str, tmp_path: Path) -> None:
    make_random_base(tmp_path / "base", SHAPES[kind], seed=1)
    plain = loaded(tmp_path / "base")
    linears = {
        name
        for name, layer in plain.named_modules()
        if type(layer).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }
    model = adapt(plain, None, Lora(r=2, target_modules="auto", dropout=0), seed=1)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained}
    assert linears <= adapted
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in adapted)


def test_an_adapter_comes_back_as_it_was_written_with_the_dropout_of_its_phase(base: Path, tmp_path: Path) -> None:
    model = adapt(loaded(base), None, Lora(r=2, dropout=0.1), seed=1)
    masters = {name: torch.randn(weight.shape) for name, weight in model.named_parameters() if weight.requires_grad}
    (tmp_path / "best_adapter").mkdir()
    write_weights(model, tmp_path / "best_adapter", writes=True, masters=of(model, masters))
    for dropout in (0.4, 0.0):
        again = adapt(loaded(base), tmp_path / "best_adapter", Lora(r=2, dropout=dropout), seed=9)
        assert isinstance(again, PeftModel)
        has = dict(again.named_parameters())
        assert all(torch.equal(has[name], each.to(has[name].dtype)) for name, each in masters.items())
        layers = [module for name, module in again.named_modules() if name.endswith("lora_dropout.default")]
        assert {getattr(layer, "p", 0.0) for layer in layers} == {dropout} and len(layers) == 14
        again.train()
        differs = not torch.equal(*(again(IDS, use_cache=False).logits for _ in range(2)))
        assert differs == (dropout > 0)
    other = adapt(loaded(base), None, Lora(r=2), seed=2)
    assert not all(torch.equal(dict(other.named_parameters())[name], each) for name, each in masters.items())


def test_a_base_that_is_not_whole_is_refused(base: Path) -> None:
    """transformers would draw at random what is missing, and only warn."""
    path = base / "model.safetensors"
    whole = load_file(path)
    save_file({name: each for name, each in whole.items() if "layers.1.mlp" not in name}, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj\.weight and 2 more are missing"):
        loaded(base)
    save_file(whole | {"model.norm.weight": torch.ones(7)}, path, {"format": "pt"})
    with pytest.raises(InputError, match="cannot be loaded"):
        loaded(base)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        loaded(base)
    save_file(whole, path, {"format": "pt"})
    assert not loaded(base).config.use_cache, "and the whole one is not"


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"hidden_size": 8}, "model_type is missing"),
        ({"model_type": "lama"}, "no model can be made of it"),
        ({**SHAPES["llama"], "hidden_size": "wide"}, "no model can be made of it"),
        ({**SHAPES["llama"], "num_attention_heads": 5, "head_dim": None}, "no model can be made of it"),
        ({"model_type": "t5"}, "no model can be made of it"),
    ],
)
def test_a_shape_that_is_no_model_is_refused(shape: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        make_random_base(tmp_path / "base", shape, seed=1)
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_random_weights_are_those_of_their_seed(base: Path, tmp_path: Path) -> None:
    make_random_base(tmp_path / "again", SHAPES["llama"], seed=1)
    make_random_base(tmp_path / "other", SHAPES["llama"], seed=2)
    one, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "again", "other"))
    assert one == again != other
    assert json.loads((base / "config.json").read_text())["dtype"] == "float32"


def test_an_attention_that_cannot_be_used_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match=r"model\.attention: flash_attention_2 cannot be used"):
        loaded(base, attention="flash_attention_2")


@pytest.mark.requirement("T-06")
@pytest.mark.parametrize(
    ("on_gpu", "installed", "precision", "tokens", "tried"),
    [
        (True, {"flash_attn"}, "bf16", 32768, ["flash_attention_2", "flex_attention", "sdpa", "eager"]),
        (
            True,
            {"flash_attn", "flash_attn_interface"},
            "bf16",
            512,
            ["flash_attention_3", "flash_attention_2", "sdpa", "eager"],
        ),
        (True, {"flash_attn"}, "fp32", 512, ["sdpa", "eager"]),
        (True, set(), "bf16", 32768, ["flex_attention", "sdpa", "eager"]),
        (True, set(), "bf16", 8192, ["sdpa", "eager"]),
        (False, {"flash_attn"}, "bf16", 32768, ["sdpa", "eager"]),
    ],
)
def test_auto_tries_the_fastest_attention_that_is_there_first(
    on_gpu: bool, installed: set[str], precision: str, tokens: int, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert list(attentions("auto", precision, tokens)) == tried
    assert list(attentions("eager", precision, tokens)) == ["eager"], "what is asked for is all that is tried"
