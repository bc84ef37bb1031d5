"""What QLoRA was trained on: the base as 4 bits leave it, tensor by tensor, and never as a model that has run.

W16 ─ nf4, double quantisation ─ W4 ─ and back ─ what the adapter saw; W16 minus that is the residual
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from phased_cpt.merge.check import Wrong
from phased_cpt.model.base import TYPES, four_bits

# nf4 costs 9 % of a weight's norm; what a CPU makes of packed weights that have run costs 144 %.
GARBAGE = 0.3


class FourBits:
    """The weights that training kept in 4 bits, and what they were there."""

    def __init__(self, empty: PreTrainedModel, precision: str, storage: str) -> None:
        quantizer = AutoHfQuantizer.from_config(four_bits(precision, storage), pre_quantized=False)
        quantizer._process_model_before_weight_loading(empty, device_map=None)
        self._linears = {
            f"{name}.weight": module for name, module in empty.named_modules() if isinstance(module, Linear4bit)
        }
        self._precision = TYPES[precision]
        self.names = frozenset(self._linears)

    def through(self, param: str, weight: Tensor) -> Tensor:
        """A weight, there and back; any other parameter as it is."""
        linear = self._linears.get(param)
        if linear is None:
            return weight
        turned = issubclass(getattr(linear, "source_cls", torch.nn.Linear), Conv1D)
        weight = weight.to(self._precision)
        given = weight.T.contiguous() if turned else weight
        kept: Any = Params4bit(given, requires_grad=False, **linear.weight.__dict__)
        kept = kept.to("cpu")  # which packs it
        back = dequantize_4bit(kept.data, kept.quant_state).to(self._precision)
        back = back.T.contiguous() if turned else back
        _require_near(param, back, weight)
        return back


def _require_near(param: str, back: Tensor, weight: Tensor) -> None:
    off = float((back.float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-30))
    if off > GARBAGE:
        raise Wrong(f"{param}: 4 bits make something else of it ({off:.0%} of its norm off); nothing is merged")
