"""The adapter that a phase trains: a fresh one, or the one that the phase before has published."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from phased_cpt.config import Lora
from phased_cpt.errors import InputError


def adapt(model: PreTrainedModel, adapter: Path | None, lora: Lora, seed: int) -> PreTrainedModel | PeftModel:
    """The model as it is trained: base frozen and adapter trainable, or every weight."""
    if not lora.enabled:
        model.requires_grad_(True)
        return model
    if adapter is not None:
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        _set_dropout(adapted, lora.dropout)
        return adapted
    torch.manual_seed(seed)  # every rank draws the same first weights
    targets = "all-linear" if lora.target_modules == "auto" else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=_whole(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"lora.target_modules: {error}") from None


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
