"""What a token costs: against torch's own count of tiny models (in this process: seconds), and a table of large."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from phased_cpt.estimate.flops import (
    HEAD,
    LINEARS,
    PEAKS,
    Flops,
    ModelShape,
    flops_per_token,
    mean_square_length,
    peak_of,
    shape_of,
    utilisation,
)

TINY = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64, "sliding_window": None,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
LENGTH, R = 24, 4


def tiny(model_type: str = "llama") -> Any:
    """With 4 heads of 16 in a width of 32, so that whoever takes one for the other is seen."""
    return CONFIG_MAPPING[model_type](**TINY)


def cost(shape: ModelShape, length: float = LENGTH, **how: Any) -> Flops:
    recipe = {"lora_r": R, "targets": "auto", "trained_head": False, "full": False, "checkpointing": False}
    return flops_per_token(shape, **(recipe | {"recomputes_loss": False} | how), mean_square_length=length)


# Against torch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """What torch counts for a token, forward and backward."""

    linears: float
    attention: float


@cache
def count(model_type: str = "llama", reentrant: bool = True, input_gradient: bool = True, **how: Any) -> Counted:
    """Eager attention, because torch counts no other on the CPU: its products are `bmm`, those of linears are not."""
    model = trained(AutoModelForCausalLM.from_config(tiny(model_type)), model_type, **how)
    if how.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if input_gradient:
        model.enable_input_require_grads()
    ids = torch.arange(LENGTH)[None]
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    flops = {str(op): number / LENGTH for op, number in counter.get_flop_counts()["Global"].items()}
    return Counted(attention=flops.pop("aten.bmm"), linears=sum(flops.values()))


def trained(model: Any, model_type: str, full: bool = False, trained_head: bool = False, **how: Any) -> Any:
    if full:
        return model
    names = list(how.get("targets", LINEARS[model_type]))
    saved = [HEAD] if trained_head else None
    return get_peft_model(model, LoraConfig(r=R, target_modules=names, modules_to_save=saved))


RECIPES = [
    {},
    {"checkpointing": True},
    {"trained_head": True},
    {"trained_head": True, "checkpointing": True},
    {"targets": ("q_proj", "self_attn.v_proj"), "checkpointing": True},
    {"full": True},
    {"full": True, "checkpointing": True},
]


@pytest.mark.parametrize("how", RECIPES, ids=str)
def test_the_linears_cost_what_torch_counts(how: dict[str, Any]) -> None:
    assert count(**how).linears == cost(shape_of(tiny()), length=0, **how).executed


@pytest.mark.parametrize("how", RECIPES, ids=str)
def test_attention_costs_half_of_what_torch_counts(how: dict[str, Any]) -> None:
    """Eager attention multiplies the half that the causal mask drops; and it keeps q·k, which flash computes again."""
    shape = shape_of(tiny())
    attention = cost(shape, **how).executed - cost(shape, length=0, **how).executed
    again = (cost(shape).model - cost(shape, length=0).model) / 3 / 2
    assert count(**how).attention == 2 * (attention - again)


@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "starcoder2"])  # biases; fused linears; no gate
def test_other_families_cost_what_torch_counts(model_type: str) -> None:
    flops = cost(shape_of(tiny(model_type)), length=0, checkpointing=True)
    assert count(model_type, checkpointing=True).linears == flops.executed


def test_an_adapter_does_not_cost_six_for_each_weight_of_the_model() -> None:
    """The negative control: 6 N, the rule of thumb of full training, is half too much, or a third beside attention."""
    assert count().linears < 0.9 * cost(shape_of(tiny()), length=0, full=True).model
    six_n = cost(LLAMA_8B, length=0, full=True).model
    assert six_n / cost(LLAMA_8B, length=0, lora_r=16).model == pytest.approx(1.5, abs=0.02)
    assert six_n / cost(LLAMA_8B, length=4096, lora_r=16).model == pytest.approx(1.34, abs=0.01)


def test_what_the_formula_leaves_aside_is_known() -> None:
    """Three savings of torch that are not in the formula; the tiny model shows them larger than they are."""
    shape = shape_of(tiny())
    layers, width, heads, kv, inner = 3, 32, 4 * 16, 2 * 16, 80

    def saved(**how: Any) -> float:
        asked = {key: how[key] for key in ("full", "checkpointing") if key in how}
        return cost(shape, length=0, **asked).executed - count(**how).linears

    lowest = 2 * width * (heads + 2 * kv) + 2 * 3 * R * width  # q, k and v of layer 0 need no gradient of their input
    assert saved(input_gradient=False) == lowest
    assert saved(checkpointing=True, reentrant=False) == layers * 2 * R * width  # the early stop: B of down_proj
    assert saved(checkpointing=True, reentrant=False, full=True) == layers * 2 * inner * width  # down_proj itself


# Against a table ------------------------------------------------------------------------------------------------------

LLAMA_1B = ModelShape(16, 2048, 8192, 32, 8, 64, 128256)
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
QWEN3_8B = ModelShape(36, 4096, 12288, 32, 8, 128, 151936)
QWEN25_32B = ModelShape(64, 5120, 27648, 40, 8, 128, 152064)
QWEN3_32B = ModelShape(64, 5120, 25600, 64, 8, 128, 151936)


@pytest.mark.parametrize(
    ("shape", "length", "model", "executed"),
    [
        (LLAMA_1B, 4096, 5.82e9, 8.19e9),
        (LLAMA_1B, 32768, 11.45e9, 16.64e9),
        (LLAMA_8B, 4096, 33.49e9, 49.14e9),
        (LLAMA_8B, 32768, 56.04e9, 82.97e9),
        (QWEN3_8B, 4096, 34.16e9, 49.95e9),
        (QWEN3_8B, 32768, 59.53e9, 88.00e9),
        (QWEN25_32B, 4096, 136.8e9, 203.5e9),
        (QWEN25_32B, 32768, 193.2e9, 288.1e9),
        (QWEN3_32B, 4096, 141.6e9, 210.8e9),
        (QWEN3_32B, 32768, 231.8e9, 346.0e9),
    ],
)
def test_known_models_cost_what_the_table_says(shape: ModelShape, length: int, model: float, executed: float) -> None:
    flops = cost(shape, length, lora_r=16, checkpointing=True)
    assert (flops.model, flops.executed) == (pytest.approx(model, rel=1e-3), pytest.approx(executed, rel=1e-3))


def test_nvidia_counts_pretraining_of_llama_8b_alike() -> None:
    """Megatron-Bridge 25.11: 14,451 tokens/s a GPU at 8k are 744 TFLOP/s."""
    assert 14_451 * cost(LLAMA_8B, 8192, full=True).model == pytest.approx(744e12, rel=0.005)


def test_a_loss_that_is_computed_twice_costs_the_head_once_more() -> None:
    once, twice = (cost(LLAMA_8B, recomputes_loss=again) for again in (False, True))
    assert twice.executed - once.executed == 2 * 4096 * 128256
    assert twice.model == once.model


def test_full_training_does_not_look_at_the_adapter() -> None:
    assert cost(LLAMA_8B, full=True, lora_r=None, targets=()) == cost(LLAMA_8B, full=True, trained_head=True)
    with pytest.raises(ValueError, match="give lora_r, or full=True"):
        cost(LLAMA_8B, lora_r=None)


def test_a_target_that_the_model_does_not_have_gets_nothing() -> None:
    """As in PEFT: the seven names of a configuration, on a Phi-3 with its fused linears, find two."""
    phi = shape_of(tiny("phi3"))
    assert cost(phi, targets=LINEARS["llama"]) == cost(phi, targets=("o_proj", "down_proj"))
    assert cost(phi, targets=LINEARS["llama"]) != cost(phi, targets="auto")


# The shape ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", LINEARS)
def test_every_family_has_the_linears_that_transformers_builds(model_type: str) -> None:
    config = tiny(model_type)
    shape = shape_of(config)
    assert shape is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    built = [
        (name.rpartition(".")[2], linear.in_features, linear.out_features)
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    expected = [(name, *shape.sides(name)) for name in shape.linears] * shape.layers + [(HEAD, 32, 96)]
    assert sorted(built) == sorted(expected)
    assert shape.layer_weights + shape.head_weights == sum(wide * high for _, wide, high in built)


@pytest.mark.parametrize("model_type", LINEARS)
def test_a_config_and_its_dict_have_one_shape(model_type: str) -> None:
    assert shape_of(tiny(model_type)) == shape_of(tiny(model_type).to_dict()) is not None


def test_what_an_old_config_leaves_out_is_what_llama_takes() -> None:
    old = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008}
    shape = shape_of(old | {"num_attention_heads": 32, "vocab_size": 32000})
    assert shape is not None
    assert (shape.kv_heads, shape.head_dim) == (32, 128)
    assert shape_of({"model_type": "llama", "vocab_size": 4096}) is None


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "mamba2", "gemma3", "gpt2", None])
def test_a_model_whose_linears_the_config_does_not_tell_has_no_shape(model_type: str | None) -> None:
    assert shape_of({**TINY, "model_type": model_type}) is None
    assert shape_of({**TINY, "model_type": "llama"}) is not None


def test_a_window_that_cuts_documents_leaves_no_shape() -> None:
    mistral = {**TINY, "model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}
    assert shape_of(mistral) is None
    assert shape_of(mistral, longest=4097) is None
    assert shape_of(mistral, longest=4096) == shape_of({**mistral, "sliding_window": None}) is not None
    qwen = {**mistral, "model_type": "qwen2"}
    assert shape_of({**qwen, "use_sliding_window": False}) is not None
    assert shape_of({**qwen, "use_sliding_window": True}) is None


# Lengths, and the peak ------------------------------------------------------------------------------------------------


def test_a_token_attends_within_its_document() -> None:
    assert mean_square_length([8000]) == 8000
    assert mean_square_length([4000, 4000]) == 4000
    assert mean_square_length([6000, 1000, 1000]) == 4750
    assert mean_square_length([]) == 0


def test_long_documents_of_numpy_do_not_overflow() -> None:
    lengths = np.array([131072, 131072], dtype=np.int32)
    assert mean_square_length(lengths) == 131072
    with np.errstate(over="ignore"):
        assert int((lengths * lengths).sum()) == 0  # the negative control


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(gpu: str, peak: float) -> None:
    assert peak_of(gpu, "bf16") == peak_of(gpu, "fp16") == peak
    assert peak_of(gpu, "fp32") is None


@pytest.mark.parametrize(
    "gpu",
    [
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GH200 480GB",
        "NVIDIA A10G",
        "NVIDIA A10-24Q",
        "NVIDIA L40G",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_gpu_with_a_like_name_is_another_one(gpu: str) -> None:
    assert peak_of(gpu, "bf16") is None
    assert any(name in gpu for name in PEAKS)  # the negative control: a part of the name would be found


@pytest.mark.parametrize(
    "gpu", ["NVIDIA H100", "NVIDIA H100 80GB HBM2e", "NVIDIA H20", "AMD Instinct MI300X", "cpu", ""]
)
def test_a_gpu_that_is_not_known_has_no_peak(gpu: str) -> None:
    assert peak_of(gpu, "bf16") is None


def test_half_of_the_peak_is_what_the_table_says() -> None:
    """An 8B at 4k with checkpointing computes at half the peak of an H200 with 10,062 tokens/s."""
    share = utilisation(10_062, cost(LLAMA_8B, 4096, lora_r=16, checkpointing=True), PEAKS["H200"])
    assert share == (pytest.approx(0.34, abs=0.002), pytest.approx(0.5, abs=0.001))
    assert share.mfu < share.hfu
    plain = utilisation(10_062, cost(LLAMA_8B, 0, lora_r=16), PEAKS["H200"])
    assert plain.mfu == plain.hfu  # nothing is computed twice
