"""The weights that are trained, in fp32: taken out of DeepSpeed's partitions, and put there to the bit.

DeepSpeed keeps an fp32 master of each trained weight, in parts over the ranks, and the model computes with a copy in
bf16. What a phase publishes are the masters, and what the next one starts from are these masters again: an engine that
makes new ones of the rounded copy, as ZeRO-2 does, has others from the first step on.
"""

from collections.abc import Iterator

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn

Masters = dict[str, Tensor]
AT_ONCE = 2**22  # elements of a sum: an embedding, as a whole, would take five times its size


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that learn, in the order of the model."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def before_the_engine(model: nn.Module) -> Masters:
    """The first weights as they were drawn or loaded; without those that ZeRO-3 holds in parts already."""
    return {name: weight.detach().float().cpu().clone() for name, weight in trained(model) if not _in_parts(weight)}


def _in_parts(weight: nn.Parameter) -> bool:
    return hasattr(weight, "ds_id")


def master_of(weight: nn.Parameter) -> Tensor:
    """The whole master of a weight. Collective."""
    master: Tensor | None = weight if is_its_own_master(weight) else safe_get_full_fp32_param(weight)
    if master is None:
        raise RuntimeError("the engine has no fp32 master of a trained weight; ZeRO-2 and ZeRO-3 have")
    return master.detach().view(getattr(weight, "ds_shape", weight.shape))


def is_its_own_master(weight: nn.Parameter) -> bool:
    """Without ZeRO, which is for fp32 alone here."""
    return not _in_parts(weight) and not hasattr(weight, "_hp_mapping") and weight.dtype == torch.float32


def put_back(model: nn.Module, masters: Masters) -> int:
    """Make the engine's masters equal to these, and say how many were not. Collective."""
    changed = 0
    for name, weight in trained(model):
        wanted = masters.get(name)
        if wanted is None:
            continue
        held = master_of(weight)
        if not torch.equal(held.cpu(), wanted):
            if is_its_own_master(weight):
                held.copy_(wanted)
            else:
                safe_set_full_fp32_param(weight, wanted.to(held.device))
            changed += 1
    return changed


def bit_sums(model: nn.Module) -> dict[str, int]:
    """A number of each master that every change of it changes. Collective."""
    return {name: bit_sum(master_of(weight)) for name, weight in trained(model)}


def bit_sum(tensor: Tensor) -> int:
    """The bits of a tensor in fp32, added up as integers, each weighed by its place."""
    flat, total = tensor.detach().flatten(), 0
    for begin in range(0, flat.numel(), AT_ONCE):
        bits = flat[begin : begin + AT_ONCE].float().view(torch.int32).to(torch.int64)
        places = torch.arange(begin, begin + len(bits), device=bits.device) % 65521 + 1
        total += int((bits * places).sum())
    return total
