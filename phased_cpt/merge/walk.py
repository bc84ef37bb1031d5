"""A forward pass of a model that is never there as a whole: each layer gets its weights, works, and loses them again.

embedding ─ layer 0 ─ layer 1 ─ … ─ norm ─ head        one of them in memory at a time
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import linear

from phased_cpt.merge.numbers import Read
from phased_cpt.merge.texts import Windows


class Numbers(Protocol):
    """Of a model that is on the meta device, by the names of its weights and buffers."""

    def read(self, name: str, /) -> Tensor: ...

    def rows(self, name: str, begin: int, end: int, /) -> Tensor: ...


def walked(model: nn.Module, numbers: Numbers, windows: Windows, device: torch.device) -> Tensor:
    """The logits of windows of text, computed in fp32, whatever the weights are kept in."""
    hooks, stations = [], list(_stations(model))
    for name, module, whole in stations:
        if not whole and type(module) in IN_PARTS:
            module.forward = partial(IN_PARTS[type(module)], name, module, numbers, device)
        else:
            weights = _Weights(name, module, whole, numbers.read, device)
            hooks += [module.register_forward_pre_hook(weights.come), module.register_forward_hook(weights.go)]
    try:
        _fill_buffers(model, numbers.read, device)
        with torch.no_grad():
            ids, positions = windows.ids.to(device), windows.positions.to(device)
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
        self._places = [
            (module, leaf, ".".join(part for part in (name, inner, leaf) if part))
            for inner, module in (station.named_modules() if whole else [("", station)])
            for leaf, weight in module._parameters.items()
            if weight is not None
        ]
        self._narrow = {id(module) for module in _plain_linears(station)} if device.type == "cpu" else set()

    def come(self, *_: object) -> None:
        for module, leaf, name in self._places:
            weight = self._read(name).to(self._device)
            if id(module) in self._narrow:
                module.__dict__["forward"] = partial(_widening, cast(nn.Linear, module))
            else:
                weight = weight.float()
            module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)

    def go(self, *_: object) -> None:
        for module, leaf, _name in self._places:
            weight = module._parameters[leaf]
            assert weight is not None
            module._parameters[leaf] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
            module.__dict__.pop("forward", None)


def _plain_linears(station: nn.Module) -> Iterator[nn.Linear]:
    """Layers of the base that are only ever called: DoRA looks into its own, and PEFT at the type of its weights."""
    adapted = [each for each in station.modules() if isinstance(each, LoraLayer | AuxiliaryTrainingWrapper)]
    kept = {id(each.get_base_layer()) for each in adapted if isinstance(each, LoraLayer) and not each.lora_variant}
    within = {id(inner) for each in adapted for inner in each.modules()} - kept
    yield from (each for each in station.modules() if type(each) is nn.Linear and id(each) not in within)


def _widening(module: nn.Linear, given: Tensor) -> Tensor:
    """In fp32, of weights that become so a few rows at a time, in the cache: half of the walk was to write them out."""
    parts = [linear(given.float(), part.float()) for part in torch.split(module.weight, CACHED_ROWS)]
    answer = torch.cat(parts, -1)
    return answer if module.bias is None else answer + module.bias.float()


# The largest tensors there are, at both ends of a model, are never there as a whole: of an embedding only the rows that
# are looked up, of a head some rows after the others.


def _embedded(name: str, module: nn.Module, numbers: Numbers, device: torch.device, ids: Tensor) -> Tensor:
    which, places = torch.unique(ids, return_inverse=True)
    rows = torch.cat([numbers.rows(f"{name}.weight", at, at + 1) for at in which.tolist()])
    return rows.to(device, torch.float32)[places]


def _by_rows(name: str, module: nn.Module, numbers: Numbers, device: torch.device, given: Tensor) -> Tensor:
    high = module.out_features
    assert isinstance(high, int)
    cuts = [(begin, min(begin + ROWS, high)) for begin in range(0, high, ROWS)]
    parts = (numbers.rows(f"{name}.weight", *cut).to(device, torch.float32) for cut in cuts)
    answer = torch.cat([linear(given, part) for part in parts], -1)
    return answer if module.bias is None else answer + numbers.read(f"{name}.bias").to(device, torch.float32)


IN_PARTS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Embedding: _embedded, nn.Linear: _by_rows}
ROWS = 8192
CACHED_ROWS = 256


def _fill_buffers(model: nn.Module, read: Callable[[str], Tensor], device: torch.device) -> None:
    """Those that are saved with the weights are read; the others are computed, and there already."""
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is None or buffer.is_meta:  # PEFT keeps what it could unmerge with
                continue
            if leaf not in module._non_persistent_buffers_set:
                buffer.copy_(read(f"{prefix}.{leaf}" if prefix else leaf))
            module._buffers[leaf] = buffer.to(device)
