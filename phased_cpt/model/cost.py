"""What the training of a phase costs on the GPU it runs on, so that its speed can be told as a share of the peak."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from phased_cpt.data.blocks import IGNORED, Blocks
from phased_cpt.estimate.flops import Flops, flops_per_token, mean_square_length, peak_of, shape_of, utilisation
from phased_cpt.plan import PhasePlan

ROWS_LOOKED_AT = 64  # for how many positions stand behind a trained token


@dataclass(frozen=True)
class Cost:
    """Of a phase."""

    flops: Flops
    peak: float
    gpu: str
    gpus: int
    positions_per_token: float  # context and first tokens are computed, too

    def __str__(self) -> str:
        model, executed = self.flops.model / 1e9, self.flops.executed / 1e9
        peak = f"mfu and hfu are of {self.peak / 1e12:.0f} TFLOP/s ({self.gpu})"
        return f"a token costs {model:.2f} GFLOP, {executed:.2f} with what is computed again; {peak}"

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        shares = utilisation(tokens_per_second * self.positions_per_token / self.gpus, self.flops, self.peak)
        return {"mfu": round(shares.mfu, 4), "hfu": round(shares.hfu, 4)}


def cost_of(config: PretrainedConfig, phase: PhasePlan, blocks: Blocks, gpu: str, gpus: int) -> Cost | None:
    """None where the GPU's peak or the model's cost is not known."""
    settings, peak = phase.settings, peak_of(gpu, phase.model.precision)
    shape = shape_of(config.get_text_config(), settings.data.max_tokens)
    if peak is None or shape is None:
        return None
    lora = settings.lora
    flops = flops_per_token(
        shape,
        lora_r=lora.r if lora.enabled else None,
        targets=lora.target_modules,
        trained_head=False,
        full=not lora.enabled,
        checkpointing=settings.training.gradient_checkpointing,
        recomputes_loss=False,
        mean_square_length=mean_square_length(blocks.slices.length),
    )
    return Cost(flops, peak, gpu, gpus, _positions_per_token(blocks))


def _positions_per_token(blocks: Blocks) -> float:
    rows = range(0, len(blocks), max(1, len(blocks) // ROWS_LOOKED_AT))
    positions = sum(int(blocks.slices_of(row).length.sum()) for row in rows)
    return positions / max(1, sum(int((blocks[row]["labels"] != IGNORED).sum()) for row in rows))
