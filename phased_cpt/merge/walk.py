"""A forward pass of a model that is never there as a whole: each layer gets its weights, works, and loses them again.

embedding ─ layer 0 ─ layer 1 ─ … ─ norm ─ head        one of them in memory at a time
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from phased_cpt.merge.numbers import Read
from phased_cpt.merge.texts import Windows


def walked(model: nn.Module, read: Read, rows: Windows, device: torch.device) -> Tensor:
    """The logits of rows, computed in fp32, whatever the weights are kept in.

    `model` is on the meta device; `read` gives a weight, or a buffer, by its name there.
    """
    hooks, stations = [], list(_stations(model))
    for name, module, whole in stations:
        weights = _Weights(name, module, whole, read, device)
        hooks += [module.register_forward_pre_hook(weights.come), module.register_forward_hook(weights.go)]
    try:
        _fill_buffers(model, read, device)
        with torch.no_grad():
            ids, positions = rows.ids.to(device), rows.positions.to(device)
            logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            return logits.float()
    finally:
        for hook in hooks:
            hook.remove()
        for _name, module, _whole in stations:
            module.__dict__.pop("forward", None)


def _stations(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """The modules that are loaded at a time, and whether all below them is, too."""
    inside, lists = "\0", {name for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or name.rpartition(".")[0] in lists:
            inside = f"{name}."
            yield name, module, True
        elif next(module.parameters(recurse=False), None) is not None:
            yield name, module, False


class _Weights:
    """Of one station: where each goes, and its name in the model."""

    def __init__(self, name: str, station: nn.Module, whole: bool, read: Read, device: torch.device) -> None:
        self._read, self._device = read, device
        self._frugal = not whole and type(station) in FRUGAL
        if self._frugal:
            station.forward = partial(FRUGAL[type(station)], station)
        self._places = [
            (module, leaf, ".".join(part for part in (name, inner, leaf) if part))
            for inner, module in (station.named_modules() if whole else [("", station)])
            for leaf, weight in module._parameters.items()
            if weight is not None
        ]

    def come(self, *_: object) -> None:
        for module, leaf, name in self._places:
            weight = self._read(name).to(self._device)
            if not self._frugal:
                weight = weight.float()
            module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)

    def go(self, *_: object) -> None:
        for module, leaf, _name in self._places:
            weight = module._parameters[leaf]
            assert weight is not None
            module._parameters[leaf] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)


def _embedded(module: nn.Module, ids: Tensor) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return embedding(ids, weight).float()


def _in_parts(module: nn.Module, given: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    answer = torch.cat([linear(given, part.float()) for part in torch.split(weight, ROWS)], -1)
    return answer + bias if isinstance(bias, Tensor) else answer


# The largest tensors there are, at both ends of a model: in fp32 they would be twice as large.
FRUGAL: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Embedding: _embedded, nn.Linear: _in_parts}
ROWS = 8192


def _fill_buffers(model: nn.Module, read: Callable[[str], Tensor], device: torch.device) -> None:
    """Those that are saved with the weights are read; the others are computed, and there already."""
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is None or buffer.is_meta:  # PEFT keeps what it could unmerge with
                continue
            if leaf not in module._non_persistent_buffers_set:
                buffer.copy_(read(f"{prefix}.{leaf}" if prefix else leaf))
            module._buffers[leaf] = buffer.to(device)
