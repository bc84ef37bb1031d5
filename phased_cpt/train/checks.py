"""What is asserted of a phase in training: documents kept apart, every weight learning, the base unmoved."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torch.utils.hooks import RemovableHandle

from phased_cpt.errors import PhasedCptError
from phased_cpt.evals.heldout import measuring
from phased_cpt.train.masters import AT_ONCE, trained

PROBE_TOKENS = 128  # two documents of 64: a border within a block of every kernel
LEAK_SHARE = 0.01  # of what the perturbation does without a border; rounding does less, a leak all of it
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Documents in a row do not see each other --------------------------------------------------------------------------


def leak(model: nn.Module, vocabulary: int, max_tokens: int, device: torch.device) -> float:
    """How much a document is moved by a change of the one before it, as a share of what it is without a border.

    ids        a a a a b b b b        x x x x b b b b      the same b, behind another document
    positions  0 1 2 3 0 1 2 3        0 1 2 3 0 1 2 3      → the logits of b must not change
               0 1 2 3 4 5 6 7        0 1 2 3 4 5 6 7      → the control: here they do
    Collective: the model runs four times.
    """
    length = min(PROBE_TOKENS, max_tokens) // 2
    draw = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(vocabulary, (length,), generator=draw) for _ in range(3))
    together = torch.arange(2 * length)
    apart = together % length

    def moved(positions: Tensor) -> float:
        seen = [_logits(model, torch.cat([before, second]), positions, device)[length:] for before in (first, other)]
        return float((seen[0] - seen[1]).abs().mean())

    with torch.no_grad(), measuring(model):
        control = moved(together)
        return moved(apart) / control if control != 0 else 0.0


def _logits(model: Callable[..., Any], ids: Tensor, positions: Tensor, device: torch.device) -> Tensor:
    row = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device)}
    logits: Tensor = model(**row, use_cache=False).logits
    return logits[0].float()


# Every weight learns -----------------------------------------------------------------------------------------------


class Learning:
    """Whether each trained weight is reached by the gradient, and moves.

    With B = 0 the gradient of A is exactly zero: B moves in the first step, A in the second. A vector may stand still
    for as long as the warm-up begins below what fp32 can tell: 1 - 2e-8 is 1. The small numbers of a matrix do not.
    """

    def __init__(self, model: nn.Module, first: dict[str, int]) -> None:
        self._first = first  # a number for the bits of each weight
        self._reached: set[str] = set()
        self._hooks = [self._hook(name, weight) for name, weight in trained(model)]
        self._names = [name for name, _ in trained(model)]
        self._vectors = {name for name, weight in trained(model) if len(getattr(weight, "ds_shape", weight.shape)) < 2}

    def _hook(self, name: str, weight: nn.Parameter) -> RemovableHandle:
        def reached(gradient: Tensor) -> None:
            self._reached.add(name)

        handle: RemovableHandle = weight.register_hook(reached)  # type: ignore[no-untyped-call]
        return handle

    def require_reached(self) -> list[str]:
        """After the first batch; returns the weights that need not be (experts that no token was routed to)."""
        for hook in self._hooks:
            hook.remove()
        missed = [name for name in self._names if name not in self._reached]
        if wrong := [name for name in missed if not _may_rest(name)]:
            raise PhasedCptError(f"no gradient reaches {_named(wrong)}: these weights would never learn")
        return missed

    def require_moved(self, now: dict[str, int], step: int) -> None:
        """After the first step and the second."""
        due = [name for name in now if step >= (2 if ".lora_A." in name else 1)]
        still = [name for name in due if now[name] == self._first[name]]
        if wrong := [name for name in still if not _may_rest(name) and name not in self._vectors]:
            mend = "the learning rate may be too small to be seen in fp32, or these layers are not used"
            raise PhasedCptError(f"step {step} has not moved {_named(wrong)}; {mend}")


def _may_rest(name: str) -> bool:
    return re.search(r"\bexperts?\b", name) is not None


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# The base does not move --------------------------------------------------------------------------------------------


def frozen_sum(model: nn.Module) -> int:
    """The bits of every frozen weight, added up as integers; of what this rank holds of them."""
    total = 0
    for weight in model.parameters():
        if not weight.requires_grad:
            held = getattr(weight, "ds_tensor", weight).detach()
            bits = held.contiguous().view(INTEGERS[held.element_size()]).flatten()
            # In pieces: the sum of a tensor is made of a copy of it in int64, eight bytes a weight.
            total += sum(int(part.sum(dtype=torch.int64)) for part in bits.split(AT_ONCE))
    return total


def require_base_unmoved(before: int, model: nn.Module, device: torch.device, ranks: int) -> None:
    """Collective: every rank learns of a change on any."""
    moved = torch.tensor([int(frozen_sum(model) != before)], device=device)
    if ranks > 1:
        all_reduce(moved, ReduceOp.MAX)
    if moved.item():
        raise PhasedCptError("the base has changed during training, and it should be frozen; nothing is published")
