"""The memory of a phase: the arithmetic of it, beside what others have written down, and tied to the code it is about."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from phased_cpt.estimate import activations, memory, recipe
from phased_cpt.estimate.architecture import architecture_of
from phased_cpt.estimate.memory import estimate, trained, weights_whole
from phased_cpt.estimate.recipe import HALF, SINGLE, Recipe, Sharding, remembered
from phased_cpt.evals import loss
from phased_cpt.model import base
from phased_cpt.train import masters

LLAMA_8B = architecture_of(
    {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
)  # fmt: skip
EVERY_WEIGHT = Recipe(
    ranks=8, ranks_of_a_node=8, sharding=Sharding(stage=2), number=HALF, four_bits=False, lora_r=None, targets=(),
    dropout=0.0, rows=1, tokens=128, accumulation=1, checkpointing=True, loss="chunked",
    attention="flash_attention_2", optimizer="adamw_torch_fused", evaluated_rows=1, converted=False, on_gpu=True,
)  # fmt: skip
ADAPTER = replace(EVERY_WEIGHT, lora_r=16, targets="auto", dropout=0.05)
ZERO3 = Sharding(stage=3)
P = LLAMA_8B.weights


def parts(how: Recipe) -> dict[str, int]:
    return dict(estimate(LLAMA_8B, how)[0].parts)


# State ----------------------------------------------------------------------------------------------------------------


def test_zero_2_shares_all_but_the_weights() -> None:
    """16 bytes a weight are 2 + 14 / N, and the step has gradients in a row and in fp32 besides."""
    found = parts(replace(EVERY_WEIGHT, ranks=4))
    assert found["weights"] == 2 * P
    assert found["masters"] + found["moments"] + found["gradients"] == pytest.approx(14 * P / 4)
    assert found["step"] == pytest.approx(6 * P / 4)


def test_zero_3_shares_the_weights_as_well() -> None:
    found = parts(replace(EVERY_WEIGHT, sharding=ZERO3, ranks=4))
    assert found["weights"] == P * 2 // 4
    assert found["masters"] + found["moments"] + found["gradients"] == pytest.approx(14 * P / 4)
    assert estimate(LLAMA_8B, replace(EVERY_WEIGHT, sharding=ZERO3, ranks=1))[0].peak > 16 * P


def test_an_offload_moves_what_it_moves_to_the_host() -> None:
    device, host = estimate(LLAMA_8B, replace(EVERY_WEIGHT, sharding=Sharding(stage=2, optimizer_on_host=True)))
    assert {"masters", "moments"}.isdisjoint(device.parts)
    assert host.parts["masters"] == host.parts["moments"] // 2 == pytest.approx(4 * P / 8, rel=1e-6)
    device, host = estimate(LLAMA_8B, replace(EVERY_WEIGHT, sharding=Sharding(3, True, True)))
    assert "weights" not in device.parts
    assert host.parts["weights"] == 2 * P // 8


def test_four_bits_leave_the_embedding_and_the_head() -> None:
    """0.516 bytes for each weight of a linear: nf4, a byte for 64 and fp32 for 64 × 256 of them."""
    found = weights_whole(LLAMA_8B, replace(ADAPTER, four_bits=True))
    assert found == pytest.approx(LLAMA_8B.in_linears * 0.51587 + (P - LLAMA_8B.in_linears) * 2, rel=1e-5)
    assert found / 1e9 == pytest.approx(5.70, abs=0.01)  # what an 8B takes in 4 bits


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt2"])
def test_four_bits_take_what_bitsandbytes_makes_of_them(family: str, tmp_path: Path) -> None:
    """Loaded as a phase loads it. The experts of a layer are no linears, and stay as they are."""
    config: dict[str, Any] = {"model_type": family, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        config |= {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        config |= sizes | {"num_key_value_heads": 2, "head_dim": 32} | (EXPERTS if family != "llama" else {})
    base.make_random_base(tmp_path / "base", config, seed=1)
    how = {"precision": "bf16", "attention": "eager", "max_tokens": 64, "trust_remote_code": False, "tell": print}
    loaded = base.load_base(tmp_path / "base", storage="auto", **how)
    model = architecture_of(config)
    constants = model.in_linears * (memory.FOUR_BITS - 0.5)  # which are no parameters
    held = sum(weight.numel() * weight.element_size() for weight in loaded.parameters())
    assert weights_whole(model, replace(ADAPTER, four_bits=True)) == pytest.approx(held + constants, abs=2)
    assert held < weights_whole(model, ADAPTER)


def test_an_adapter_has_the_weights_that_peft_makes() -> None:
    tiny: dict[str, Any] = {
        "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96,
    }  # fmt: skip
    for targets in ("auto", ("q_proj", "self_attn.v_proj", "nothing")):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**tiny))
        wanted = "all-linear" if targets == "auto" else list(targets)
        made = get_peft_model(model, LoraConfig(r=4, target_modules=wanted, task_type="CAUSAL_LM"))
        found = trained(architecture_of({"model_type": "llama", **tiny}), replace(ADAPTER, lora_r=4, targets=targets))
        assert found == sum(weight.numel() for weight in made.parameters() if weight.requires_grad) > 0


@pytest.mark.parametrize(
    ("optimizer", "size"), [("adamw_torch_fused", 8), ("paged_adamw_8bit", 2.1), ("sgd", 0), ("of_tomorrow", 8)]
)
def test_an_optimizer_that_is_not_known_is_taken_for_adam(optimizer: str, size: float) -> None:
    assert remembered(optimizer) == size


# Activations ----------------------------------------------------------------------------------------------------------


def test_checkpointing_keeps_the_input_of_every_layer() -> None:
    found = activations.kept_inputs(LLAMA_8B, replace(ADAPTER, tokens=32768))
    assert found == 32 * 32768 * 4096 * 2
    assert activations.kept_inputs(LLAMA_8B, replace(ADAPTER, tokens=32768, checkpointing=False)) > 15 * found


@pytest.mark.parametrize(("how", "kept"), [({"lora_r": None}, True), ({"lora_r": 4, "dropout": 0.0}, False)])
def test_a_layer_keeps_what_torch_keeps_of_it(how: dict[str, Any], kept: bool) -> None:
    """Counted by torch's own hooks, in bf16: every tensor once, less weights."""
    tokens, shape = 256, {
        "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**shape), dtype=torch.bfloat16)
    model.set_attn_implementation("sdpa")
    if how["lora_r"]:
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), autocast_adapter_dtype=False
        )
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(tokens)[None] % 96
    places = torch.arange(tokens)[None] % (tokens // 2)  # two documents
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = model.train()(input_ids=ids, position_ids=places, use_cache=False).logits
    assert held.requires_grad
    own = replace(
        EVERY_WEIGHT, **how, targets="auto", tokens=tokens, attention="sdpa", checkpointing=False, on_gpu=False
    )
    estimated = activations.kept_inputs(architecture_of({"model_type": "llama", **shape}), own)
    assert estimated == pytest.approx(sum(seen.values()), rel=0.08)


def test_a_mask_grows_with_the_square_of_a_row() -> None:
    """1 GiB of a row of 32K tokens, and the same again in numbers for each layer; flash attention has none."""
    dense = replace(ADAPTER, tokens=32768, attention="sdpa")
    assert activations.mask(dense) == 2**30
    assert activations.mask(replace(dense, attention="flash_attention_2")) == 0
    assert (
        estimate(LLAMA_8B, dense)[0].peak - estimate(LLAMA_8B, replace(dense, attention="flex_attention"))[0].peak
        > 2**31
    )


def test_all_logits_are_more_than_some_at_a_time() -> None:
    """32K tokens × 128K words: 12 bytes each are 50 GB; a chunk of them, with what comes and goes at the head, is 2."""
    rows = replace(ADAPTER, tokens=32768)
    assert activations.head(LLAMA_8B, replace(rows, loss="plain")) == 32768 * 128256 * 12
    for kind in ("chunked", "liger"):
        assert activations.head(LLAMA_8B, replace(rows, loss=kind)) < 2.5e9


# Tied to the code -----------------------------------------------------------------------------------------------------


def test_what_is_said_in_two_places_is_the_same() -> None:
    assert activations.CHUNK_ELEMENTS == loss.CHUNK_ELEMENTS
    assert recipe.LONG_ROWS == base.LONG_ROWS
    assert memory.AT_ONCE == masters.AT_ONCE
    assert (torch.bfloat16.itemsize, torch.float32.itemsize) == (HALF, SINGLE)


def test_dora_learns_a_number_for_each_row_and_needs_room_to_know_their_lengths() -> None:
    """Llama 3.1 8B: q and o 4096, k and v 1024, gate and up 14336, down 4096 rows in each of 32 layers."""
    rows = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    plain, dora = (LLAMA_8B.adapter(16, "auto", dora=each) for each in (False, True))
    assert dora - plain == rows
    lora, found = (estimate(LLAMA_8B, replace(ADAPTER, dora=each))[0] for each in (False, True))
    assert found.moments["layer"] - lora.moments["layer"] > 2 * (3 * 4096 * 14336 + 14336**2)
    assert found.moments["engine"] - lora.moments["engine"] > 0
