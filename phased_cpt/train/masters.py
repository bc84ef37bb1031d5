"""The weights that are trained, in fp32: taken out of DeepSpeed's partitions, and put there to the bit.

DeepSpeed keeps an fp32 master of each trained weight, in parts over the ranks, and the model computes with a copy in
bf16. What a phase publishes are the masters, and what the next one starts from are these masters again: an engine that
makes new ones of the rounded copy, as ZeRO-2 does, has others from the first step on.
"""

from collections.abc import Iterator, Sequence

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch import Tensor, distributed, nn

Masters = dict[str, Tensor]
AT_ONCE = 2**22  # elements that are gathered, or summed up: 16 MB


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that learn, in the order of the model."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def before_the_engine(model: nn.Module) -> Masters:
    """The first weights as they were drawn or loaded; without those that ZeRO-3 holds in parts already."""
    return {name: weight.detach().float().cpu().clone() for name, weight in trained(model) if not _in_parts(weight)}


def _in_parts(weight: nn.Parameter) -> bool:
    return hasattr(weight, "ds_id")


def masters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Each weight that learns, with the whole of its master. Collective, to the last of them."""
    named = list(trained(model))
    for (name, weight), master in zip(named, wholes([weight for _, weight in named]), strict=True):
        yield name, weight, master


def wholes(weights: Sequence[nn.Parameter], moment: str | None = None) -> Iterator[Tensor]:
    """The whole master of each weight, or of a moment that the optimizer remembers of it. Collective.

    Several small ones are gathered at a time: of an adapter, one by one, the calls take ten times what the bytes do.
    """
    for several in _together(weights):
        if is_its_own_master(several[0]):
            yield from (weight.detach() for weight in several)
        else:
            yield from _of_zero3(several, moment) if _in_parts(several[0]) else _of_zero2(several, moment)


def _together(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of weights with no more than AT_ONCE elements; a larger one is alone."""
    several: list[nn.Parameter] = []
    for weight in weights:
        if several and sum(map(size_of, several)) + size_of(weight) > AT_ONCE:
            yield several
            several = []
        several.append(weight)
    if several:
        yield several


def _of_zero2(weights: Sequence[nn.Parameter], moment: str | None) -> Iterator[Tensor]:
    """Each rank holds some stretch of some of them: laid where they belong, in zeros, and added up."""
    buffer = torch.zeros(sum(map(size_of, weights)), device=weights[0].device)
    at = 0
    for weight in weights:
        if (mapping := weight._hp_mapping) is not None:  # type: ignore[attr-defined]
            place = mapping.lp_fragment_address
            buffer.narrow(0, at + place.start, place.numel).copy_(mapping.get_hp_fragment(moment))
        at += size_of(weight)
    distributed.all_reduce(buffer, group=weights[0]._dp_group)  # type: ignore[attr-defined]
    for weight, whole in zip(weights, torch.split(buffer, [size_of(weight) for weight in weights]), strict=True):
        yield whole.view(weight.shape)


def _of_zero3(weights: Sequence[nn.Parameter], moment: str | None) -> Iterator[Tensor]:
    """Each rank holds an equal part of each of them: all parts side by side, then those of a weight in a row."""
    held = [
        safe_get_local_fp32_param(weight) if moment is None else safe_get_local_optimizer_state(weight, moment)
        for weight in weights
    ]
    mine = torch.cat([part.detach().flatten() for part in held]).float()
    group = weights[0].ds_process_group  # type: ignore[attr-defined]
    every = torch.empty(distributed.get_world_size(group) * len(mine), device=mine.device)
    distributed.all_gather_into_tensor(every, mine, group=group)
    of_ranks = torch.split(every.view(-1, len(mine)), [part.numel() for part in held], dim=1)
    for weight, parts in zip(weights, of_ranks, strict=True):
        yield parts.reshape(-1)[: size_of(weight)].view(shape_of(weight))


def shape_of(weight: nn.Parameter) -> tuple[int, ...]:
    """Of the whole."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def size_of(weight: nn.Parameter) -> int:
    return int(getattr(weight, "ds_numel", weight.numel()))


def is_its_own_master(weight: nn.Parameter) -> bool:
    """Without ZeRO, which is for fp32 alone here."""
    return not _in_parts(weight) and not hasattr(weight, "_hp_mapping") and weight.dtype == torch.float32


def put_back(model: nn.Module, masters: Masters) -> int:
    """Make the engine's masters equal to these, and say how many were not. Collective."""
    changed = 0
    for name, weight, held in masters_of(model):
        wanted = masters.get(name)
        if wanted is None or torch.equal(held.cpu(), wanted):
            continue
        if is_its_own_master(weight):
            held.copy_(wanted)
        elif _in_parts(weight):
            safe_set_local_fp32_param(weight, part_of(weight, wanted.to(held.device)))
        else:
            safe_set_full_fp32_param(weight, wanted.to(held.device))
        changed += 1
    return changed


def show(model: nn.Module, masters: Masters) -> None:
    """Let the model compute with these. The engine's own masters stay: this is for the end, when it trains no more."""
    for name, weight in trained(model):
        wanted = masters[name].to(weight.device, weight.dtype)
        if _in_parts(weight):
            weight.ds_tensor.copy_(part_of(weight, wanted))  # type: ignore[attr-defined]
        if weight.shape == wanted.shape:  # not so of one that lies in parts alone just now
            weight.data.copy_(wanted)


def part_of(weight: nn.Parameter, whole: Tensor) -> Tensor:
    """What this rank holds of a weight under ZeRO-3. The last part is filled up, so that all are equal; DeepSpeed's own
    way to set a whole weight forgets that, and fails where the ranks do not divide it.
    """
    size, group = weight.ds_tensor.numel(), weight.ds_process_group  # type: ignore[attr-defined]
    filled = whole.new_zeros(size * distributed.get_world_size(group))
    filled[: whole.numel()] = whole.flatten()
    return filled.narrow(0, size * distributed.get_rank(group), size)


def bit_sums(model: nn.Module) -> dict[str, int]:
    """A number of each master that every change of it changes. Collective."""
    return {name: bit_sum(master) for name, _, master in masters_of(model)}


def bit_sum(tensor: Tensor) -> int:
    """The bits of a tensor in fp32, added up as integers, each weighed by its place."""
    flat, total = tensor.detach().flatten(), 0
    for begin in range(0, flat.numel(), AT_ONCE):
        bits = flat[begin : begin + AT_ONCE].float().view(torch.int32).to(torch.int64)
        places = torch.arange(begin, begin + len(bits), device=bits.device) % 65521 + 1
        total += int((bits * places).sum())
    return total
