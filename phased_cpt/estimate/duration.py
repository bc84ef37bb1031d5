"""How long a phase takes: by a speed that was measured, or by what its tokens cost and a GPU can do."""

from collections.abc import Mapping
from typing import Any

from phased_cpt.estimate.flops import flops_per_token, peak_of, shape_of
from phased_cpt.estimate.recipe import Recipe

# Of the peak, of all that is computed: what published LoRA runs reach, of which many are between 0.35 and 0.55.
UTILISATION = 0.4


def seconds_by_peak(
    config: Mapping[str, Any], recipe: Recipe, positions: int, mean_square_length: float, gpu: str
) -> float | None:
    """None where the model's cost or the GPU's peak is not known."""
    shape = shape_of(config, recipe.tokens)
    peak = peak_of(gpu, "bf16" if recipe.number == 2 else "fp32")
    if shape is None or peak is None:
        return None
    flops = flops_per_token(
        shape,
        lora_r=recipe.lora_r,
        targets=recipe.targets,
        trained_head=False,
        full=recipe.lora_r is None,
        checkpointing=recipe.checkpointing,
        recomputes_loss=False,
        mean_square_length=mean_square_length,
    )
    return positions * flops.executed / (UTILISATION * peak * recipe.ranks)
