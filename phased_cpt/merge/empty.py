"""A model without weights: its shape, its buffers, and names for all that would be in it."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from phased_cpt.errors import InputError


def empty_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture of a folder, on the meta device."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        _require_plain(folder, config.to_dict())
        # Buffers are computed, and no weight is drawn.
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            ).eval()
    except InputError:
        raise
    except Exception as error:  # each architecture has its own ways
        mend = "; --set model.trust_remote_code=true lets it run" if "trust_remote_code" in str(error) else ""
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: no model can be made of its config.json: {reason}{mend}") from None
    model.tie_weights()
    return model


def _require_plain(folder: Path, config: dict[str, object]) -> None:
    kept = config.get("quantization_config")
    if isinstance(kept, dict):
        how = kept.get("quant_method", "a quantisation")
        mend = "name the 16-bit model that it was made from (--base)"
        raise InputError(f"{folder}: its weights are kept in {how}, which nothing can be merged into; {mend}")
