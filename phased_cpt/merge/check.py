"""Whether what was written is base and adapters, and nothing else: layer by layer, and from end to end.

each layer   PEFT's own layer with the adapters live  =  the plain layer with the merged weights      on random inputs
the whole    base + adapters, walked                  =  the folder that was written, walked          on held-out text
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from phased_cpt.errors import PhasedCptError

EXACT = 1e-5  # relative, in fp32
ROUNDED = 0.05  # of the logits' spread, where every merged weight was rounded to 8 or 11 bits
AGREED = 0.999
PROBES = 4


class Wrong(PhasedCptError):  # noqa: N818
    """What comes out is not what should."""


@dataclass(frozen=True)
class Logits:
    """How far the merged model is from base and adapters."""

    tokens: int
    relative: float  # largest difference, of the largest logit
    spread: float  # mean difference, of the spread of the logits
    clear: int  # positions where rounding cannot swap the first two
    agreed: int  # of those, with the same first
    exact: bool  # whether fp32 was written

    @property
    def holds(self) -> bool:
        if not math.isfinite(self.relative):
            return False
        return self.relative <= EXACT if self.exact else self.spread <= ROUNDED and self.agreed >= AGREED * self.clear

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def compared(live: Tensor, merged: Tensor, *, exact: bool) -> Logits:
    """Of the same rows."""
    apart = (live - merged).abs()
    largest = float(apart.max())
    first, second = live.topk(2, dim=-1).values.unbind(-1)
    clear = first - second > 2 * largest
    agreed = (live.argmax(-1) == merged.argmax(-1)) & clear
    return Logits(
        tokens=math.prod(live.shape[:-1]),
        relative=largest / max(float(live.abs().max()), 1e-30),
        spread=float(apart.mean()) / max(float(live.std()), 1e-30),
        clear=int(clear.sum()),
        agreed=int(agreed.sum()),
        exact=exact,
    )


class Probe:
    """A layer of PEFT with its adapters live, asked before it is merged, and after.

    Random inputs find any mistake of the algebra, and cost a thousandth of the product itself.
    """

    def __init__(self, name: str, site: nn.Module, adapters: list[str]) -> None:
        self._name, self._site, self._adapters = name, site, adapters
        generator = torch.Generator().manual_seed(len(name))
        self._given = [_inputs(layer, generator) for layer in _layers(site)]
        self._expected = self._answers(live=True)

    def off(self) -> float:
        """How far the merged layer's answers are from those before."""
        pairs = zip(self._expected, self._answers(live=False), strict=True)
        off = max((_off(*pair) for pair in pairs), default=0.0)
        if not math.isfinite(off):
            raise Wrong(f"{self._name} is not finite after merging; the adapter, or the base, is damaged")
        if off > EXACT:
            what = f"the merged weights are not base and adapter ({off:.1e} off)"
            raise Wrong(f"{self._name}: {what}; nothing is merged")
        return off

    def _answers(self, *, live: bool) -> list[Tensor]:
        with torch.no_grad():
            pairs = zip(_layers(self._site), self._given, strict=True)
            return [_answer(layer, given, self._adapters if live else []) for layer, given in pairs]


def _layers(site: nn.Module) -> list[LoraLayer]:
    """A layer; of experts, whose parameters each have a wrapper around the last, all of them."""
    found: list[LoraLayer] = []
    while isinstance(site, LoraLayer):
        found.append(site)
        if not isinstance(site, ParamWrapper):
            break
        site = site.base_layer
    return found  # none, of what an adapter only replaces


def _inputs(layer: LoraLayer, generator: torch.Generator) -> Tensor:
    if isinstance(layer, ParamWrapper):
        weight: Tensor = layer.get_param()  # type: ignore[no-untyped-call]
        return torch.randn(weight.shape[-1], PROBES, generator=generator)
    plain = layer.get_base_layer()
    if isinstance(plain, nn.Embedding):
        return torch.randint(plain.num_embeddings, (PROBES * 8,), generator=generator)
    assert layer.in_features is not None
    return torch.randn(PROBES, layer.in_features, generator=generator)


def _answer(layer: LoraLayer, given: Tensor, live: list[str]) -> Tensor:
    """Experts have no inputs of their own: the weights that their forward would read are multiplied instead."""
    plain: Any = layer.get_base_layer()
    if not isinstance(layer, ParamWrapper):
        answer: Tensor = layer(given) if live else plain(given)  # type: ignore[operator]
        return answer
    with layer._activate_lora(live):
        weight: Tensor = getattr(plain, layer.parameter_name)
        return weight @ given


def _off(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
