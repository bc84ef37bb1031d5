"""Which base a QLoRA adapter is merged into: the 16-bit one, or what 4 bits had left of it in training.

The adapter was trained beside the latter; the former is the better model. Which of the two merged models loses less on
held-out text is measured, on the models as they would be written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from phased_cpt.merge.pieces import Output, numbers_of
from phased_cpt.merge.quantised import FourBits
from phased_cpt.merge.texts import Windows
from phased_cpt.merge.walk import walked

WINDOWS = 64
# Operations that a measurement may take on a CPU: a minute or two. It decides how many windows are looked at.
CPU_OPERATIONS = 2e13
FEWEST_TOKENS = 1024
LOGIT_BYTES = 2**28
LAYERS_LOOKED_AT = 8

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """The base that was taken, and why."""

    kind: str
    why: str
    facts: dict[str, Any]


def tokens_that_fit(empty: PreTrainedModel, passes: int, device: torch.device) -> int | None:
    """How many tokens may go through the model so often; None: as many as there are."""
    if device.type != "cpu":
        return None
    return int(CPU_OPERATIONS / (2 * passes * max(1, numbers_of(empty))))


def choose(
    asked: str,
    outputs: Mapping[str, Output],
    empty: PreTrainedModel,
    windows: Windows | None,
    four_bits: FourBits,
    device: torch.device,
    tell: Tell,
) -> Choice:
    """As asked; or the better of both, where that can be measured."""
    facts: dict[str, Any] = {"residual_to_delta": residual_to_delta(outputs["bf16"], four_bits)}
    if asked != "auto":
        return Choice(asked, "merge.base says so", facts)
    if windows is None:
        return Choice("dequantized", "there are no held-out documents to measure both on", facts)
    fit = tokens_that_fit(empty, len(outputs), device)
    length = windows.ids.shape[1]
    if fit is not None and fit < min(FEWEST_TOKENS, windows.ids.numel()):
        why = f"without a GPU, {numbers_of(empty) / 1e9:.1f} billion weights are too many to measure both"
        return Choice("dequantized", why, facts)
    count = WINDOWS if fit is None else max(1, min(WINDOWS, fit // length))
    windows = windows.first(count, length)
    tell(f"which base? both are measured on {windows.ids.shape[0]} held-out windows")
    facts |= {"windows": windows.ids.shape[0], "tokens": windows.ids.numel()}
    losses = {kind: loss_of(output, empty, windows, device) for kind, output in outputs.items()}
    facts["held_out_loss"] = losses
    better = min(losses, key=lambda kind: losses[kind])
    return Choice(better, "it loses less on held-out documents", facts)


def loss_of(output: Output, empty: PreTrainedModel, windows: Windows, device: torch.device) -> float:
    """Of a model that is not written yet."""
    rows = max(1, LOGIT_BYTES // (4 * windows.ids.shape[1] * empty.config.get_text_config().vocab_size))
    sums = [part.loss(walked(empty, output, part, device)) for part in windows.parts(rows)]
    return sum(loss for loss, _ in sums) / max(1, sum(tokens for _, tokens in sums))


def residual_to_delta(output: Output, four_bits: FourBits) -> dict[str, float]:
    """What 4 bits have taken from a layer, beside what the adapters give to it: of a few layers, from first to last."""
    params = [param for param in output.site_of if param in four_bits.names]
    ratios = []
    for param in params[:: max(1, len(params) // LAYERS_LOOKED_AT)]:
        before = output.base.read(param).float()
        residual = (before - four_bits.through(param, output.base.read(param)).float()).norm()
        delta = (output.exact(param) - before).norm()
        ratios.append(float(residual / delta.clamp(min=1e-30)))
    if not ratios:
        return {}
    return {"median": sorted(ratios)[len(ratios) // 2], "most": max(ratios), "layers": len(ratios)}
