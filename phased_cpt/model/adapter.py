"""The adapter that a phase trains: a fresh one, or the one that the phase before has published."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from phased_cpt.config import Lora
from phased_cpt.errors import InputError

# The engine keeps fp32 masters anyway. PEFT would compute with the adapter in fp32, and ZeRO-3 leaves it at that: each
# activation before an adapter would be copied to fp32, too.
FP32_ADAPTER = False


def adapt(model: PreTrainedModel, adapter: Path | None, lora: Lora, seed: int) -> PreTrainedModel | PeftModel:
    """The model as it is trained: base frozen and adapter trainable, or every weight."""
    if not lora.enabled:
        model.requires_grad_(True)
        return model
    if adapter is not None:
        adapted = _continued(model, adapter)
        _set_dropout(adapted, lora.dropout)
        return adapted
    torch.manual_seed(seed)  # every rank draws the same first weights
    targets = "all-linear" if lora.target_modules == "auto" else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=_whole(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        task_type="CAUSAL_LM",
    )
    _require_lengths(model, lora)
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=FP32_ADAPTER)
    except ValueError as error:
        raise InputError(f"lora.target_modules: {error}") from None


def stacked(model: PreTrainedModel | PeftModel, below: Sequence[Path]) -> PreTrainedModel | PeftModel:
    """Earlier adapters, frozen and without dropout, beside the one that learns: each adds to what the base says."""
    if not below:
        return model
    assert isinstance(model, PeftModel)
    names = [f"below_{number}" for number in range(1, len(below) + 1)]
    for name, folder in zip(names, below, strict=True):
        found = model.load_adapter(str(folder), name, is_trainable=False, autocast_adapter_dtype=FP32_ADAPTER)
        if wrong := [key for key in found.missing_keys if f".{name}." in key] + list(found.unexpected_keys):
            raise InputError(f"{folder}: this adapter does not fit the base: {wrong[0]}")
    learns = model.active_adapter
    cast(Any, model.base_model).set_adapter([learns, *names])
    for path, weight in model.named_parameters():
        if set(names) & set(path.split(".")):  # of embeddings they are no modules
            weight.requires_grad_(False)
    for path, _ in model.named_modules():
        owner, _, name = path.rpartition(".")
        if name in names and owner.endswith("lora_dropout"):
            cast(nn.ModuleDict, model.get_submodule(owner))[name] = nn.Identity()
    return model


def _continued(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter of a folder, all of it: of what does not fit, PEFT leaves a part as it was drawn, and only warns."""
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True, autocast_adapter_dtype=FP32_ADAPTER)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: this adapter does not fit the base {model.name_or_path}: {reason}") from None
    places = {name: torch.empty(0) for name, _ in adapted.named_parameters()}
    wanted = get_peft_model_state_dict(adapted, state_dict=places, save_embedding_layers=False)
    if (path := folder / SAFETENSORS_WEIGHTS_NAME).exists():
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
        wrong = [f"{name} is missing" for name in wanted if name not in found]
        wrong += [f"{name} has no place" for name in sorted(found) if name not in wanted]
        if wrong:
            raise InputError(f"{folder}: this adapter does not fit the base {model.name_or_path}: {wrong[0]}")
    return adapted


def described(model: nn.Module) -> str:
    """The adapter that learns, and how strongly it counts."""
    assert isinstance(model, PeftModel)
    name = model.active_adapter
    config, layers = model.peft_config[name], (each for each in model.modules() if isinstance(each, LoraLayer))
    assert isinstance(config, LoraConfig)
    found = {layer.scaling[name] for layer in layers if name in layer.scaling}  # by its rank, which may differ
    scales = dict.fromkeys((min(found), max(found)))
    kind = ("rs" if config.use_rslora else "") + ("DoRA" if config.use_dora else "LoRA")
    return f"{kind} of rank {config.r}, scaled by {' to '.join(f'{scale:.4g}' for scale in scales)}"


def _require_lengths(model: PreTrainedModel, lora: Lora) -> None:
    """On a CPU, PEFT puts another tensor in the place of a 4-bit weight that DoRA reads, which ZeRO-3 does not know."""
    four_bits = getattr(model, "is_loaded_in_4bit", False)
    shards = bool(is_deepspeed_zero3_enabled())  # type: ignore[no-untyped-call]
    if lora.use_dora and four_bits and shards and not torch.cuda.is_available():
        raise InputError("lora.use_dora: on 4-bit weights under ZeRO-3 it needs a GPU; take training.deepspeed: zero2")


def _whole(alpha: float) -> int:
    return alpha if alpha % 1 else int(alpha)  # type: ignore[return-value] # PEFT takes fractions as well, and says int


def _set_dropout(model: PeftModel, dropout: float) -> None:
    """The one value of a continued adapter that a phase may set anew."""
    for module in model.modules():
        if isinstance(layers := getattr(module, "lora_dropout", None), nn.ModuleDict):
            for name in layers:
                layers[name] = nn.Dropout(dropout) if dropout else nn.Identity()
    setattr(model.peft_config[model.active_adapter], "lora_dropout", dropout)  # noqa: B010 - of LoRA configs alone


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model, whatever is around it."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner
