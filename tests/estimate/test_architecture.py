"""The weights of a model, told from its config.json: against what transformers builds, and against known models."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from phased_cpt.estimate.architecture import EXPERTS, UnknownShapeError, architecture_of
from phased_cpt.estimate.flops import LINEARS

TINY = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64, "sliding_window": None,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OF_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}  # fmt: skip
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(family: str) -> dict[str, Any]:
    return {"model_type": family} | (GPT2 if family == "gpt2" else TINY | (OF_EXPERTS if family in EXPERTS else {}))


def built(config: dict[str, Any]) -> torch.nn.Module:
    """Without a number of it."""
    own = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**own))


@pytest.mark.parametrize("family", [*LINEARS, "gpt2", *EXPERTS])
@pytest.mark.parametrize("more", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}], ids=str)
def test_every_weight_is_counted(family: str, more: dict[str, bool]) -> None:
    if family == "gpt2" and "attention_bias" in more:
        return  # it has no such key, and always a bias
    config = tiny(family) | more
    assert architecture_of(config).weights == sum(weight.numel() for weight in built(config).parameters())
    assert architecture_of(config | {"vocab_size": 97}).weights != architecture_of(config).weights


@pytest.mark.parametrize("family", [*LINEARS, "gpt2", *EXPERTS])
def test_the_linears_are_those_that_peft_and_four_bits_find(family: str) -> None:
    model = architecture_of(tiny(family))
    kinds = [each for each in built(tiny(family)).modules() if type(each).__name__ in ("Linear", "Conv1D")]
    assert model.in_linears + model.head == sum(each.weight.numel() for each in kinds)


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        (124_439_808, {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}),
        (8_030_261_248, {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
        (7_615_616_512, {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}),
        (32_762_123_264, {"model_type": "qwen3", "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}),
        (46_702_792_704, {"model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}),
        (30_532_122_624, {"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8}),
    ],
    ids=lambda value: str(value.get("model_type")) if isinstance(value, dict) else "",
)  # fmt: skip
def test_known_models_have_the_weights_that_their_cards_say(weights: int, config: dict[str, Any]) -> None:
    assert architecture_of(config).weights == weights


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (tiny("llama") | {"model_type": "mamba2"}, "model_type 'mamba2' is none of"),
        ({"model_type": "llama", "vocab_size": 96}, "leaves num_hidden_layers, hidden_size"),
        ({"model_type": "gpt2", "vocab_size": 96}, "leaves n_layer"),
        ({"model_type": "gemma3", "text_config": tiny("gemma3_text")}, "sees images"),
        (tiny("qwen3_moe") | {"mlp_only_layers": [0]}, "others none"),
    ],
)
def test_what_a_config_does_not_tell_is_said(config: dict[str, Any], why: str) -> None:
    with pytest.raises(UnknownShapeError, match=why):
        architecture_of(config)
