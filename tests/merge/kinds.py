"""Adapters of every kind on tiny models: what PEFT can make, and people publish."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from phased_cpt.merging import Layer, MergeJob
from phased_cpt.published import weights_digest

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "head_dim": 8,
}  # fmt: skip
ATTENTION = {"target_modules": ["q_proj"]}
EXACT = 1e-5  # relative, in fp32


@dataclass(frozen=True)
class Kind:
    """An architecture, and an adapter on it."""

    model: str
    lora: Mapping[str, Any]
    shape: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "plain": Kind("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rank and alpha patterns": Kind(
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "rsLoRA": Kind("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "DoRA": Kind("llama", {"target_modules": "all-linear", "use_dora": True}),
    "DoRA of embeddings": Kind("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "both embeddings whole": Kind("llama", ATTENTION | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a norm whole": Kind("llama", ATTENTION | {"modules_to_save": ["norm"]}),
    "embeddings": Kind("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, embeddings": Kind("llama", {"target_modules": ["embed_tokens", "q_proj"]}, TIED),
    "tied, head": Kind("llama", {"target_modules": ["lm_head", "q_proj"]}, TIED),
    "tied, embeddings whole": Kind("llama", ATTENTION | {"modules_to_save": ["embed_tokens"]}, TIED),
    "tied, head whole": Kind("llama", ATTENTION | {"modules_to_save": ["lm_head"]}, TIED),
    "tied, both whole": Kind("llama", ATTENTION | {"modules_to_save": ["embed_tokens", "lm_head"]}, TIED),
    "tied and kept so, embeddings whole": Kind(
        "llama", ATTENTION | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, TIED
    ),
    "tied and kept so, embeddings": Kind(
        "llama", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, TIED
    ),
    "every bias": Kind("qwen2", ATTENTION | {"bias": "all"}),
    "biases of LoRA layers": Kind("qwen2", ATTENTION | {"bias": "lora_only"}),
    "LoRA with a bias": Kind("qwen2", ATTENTION | {"lora_bias": True}),
    "GPT-2's Conv1D": Kind(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "Phi-3's fused layers": Kind("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}, {"pad_token_id": 0}),
    "experts": Kind(
        "qwen3_moe", ATTENTION | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, MOE
    ),
    "Mixtral's experts": Kind(
        "mixtral", ATTENTION | {"target_parameters": ["mlp.experts.gate_up_proj"]}, {"num_local_experts": 4}
    ),
    "two tokens": Kind("llama", ATTENTION | {"trainable_token_indices": [3, 5]}),
    "tied, two tokens": Kind("llama", ATTENTION | {"trainable_token_indices": [3, 5]}, TIED),
}
# An adapter changes one of two that were one, or both as one that PEFT merges twice.
PEFT_IS_WRONG = ("tied, embeddings", "tied, head", "tied and kept so, embeddings")
IDS = torch.arange(20)[None] * 7 % SHAPE["vocab_size"]


@dataclass(frozen=True)
class Made:
    """A base, and an adapter on it."""

    base: Path
    adapter: Path

    def live(self) -> Any:
        """PEFT's own model, not merged."""
        return PeftModel.from_pretrained(plain(self.base), self.adapter).eval()


def plain(folder: Path, **options: Any) -> Any:
    """As anybody would load it; in fp32 unless told otherwise."""
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def write_base(folder: Path, model: str, shape: Mapping[str, Any] = {}, **save: Any) -> Path:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model, **{**SHAPE, **shape}))
    made.save_pretrained(folder, **save)
    return folder


def write_adapter(folder: Path, base: Path, seed: int = 1, strength: float = 0.05, **lora: Any) -> Path:
    """With numbers as if it had been trained: PEFT begins with those that change nothing."""
    adapted: Any = get_peft_model(plain(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **lora}))
    generator = torch.Generator().manual_seed(seed)
    for param in adapted.parameters():
        if param.requires_grad:
            param.data += torch.randn(param.shape, generator=generator) * strength
    adapted.save_pretrained(folder)
    return folder


def make(kind: str, folder: Path) -> Made:
    it = KINDS[kind]
    base = write_base(folder / "base", it.model, it.shape)
    return Made(base, write_adapter(folder / "adapter", base, **it.lora))


def job(
    base: Path,
    adapters: Path | list[Path],
    output: Path,
    *,
    dtype: str = "fp32",
    shard: int = 2_000_000_000,
    scales: Mapping[Path, float] = {},
    **more: Any,
) -> MergeJob:
    folders = adapters if isinstance(adapters, list) else [adapters]
    layers = tuple(Layer(str(each), weights_digest(each), scales.get(each, 1.0)) for each in folders)
    return MergeJob(
        base=str(base), base_digest=weights_digest(base), adapters=layers, output=str(output), dtype=dtype,
        max_shard_size=shard, **more,
    )  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS, use_cache=False).logits.float()
    return found


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((one - other).abs().max() / other.abs().max())


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def heads(folder: Path) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Of each file: type and shape of its tensors, in the order of their bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        head.pop("__metadata__", None)
        in_order = sorted(head.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        found[path.name] = {name: (each["dtype"], each["shape"]) for name, each in in_order}
    return found


def marker(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge.json").read_bytes())
    return found
