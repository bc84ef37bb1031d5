"""What the optimizer remembers, out of DeepSpeed's partitions and back into them.

by weight   exp_avg and the like, one number for each weight: gathered a few tensors at a time, and put back on any
            number of ranks under any ZeRO stage
by rank     states of another shape (of 8-bit optimizers, quantised over a rank's whole part): as they are, and only
            for the same partition again
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state
from torch import Tensor, nn

from phased_cpt.train.masters import is_its_own_master, part_of, trained, wholes

State = dict[str, Any]


@dataclass(frozen=True)
class Kinds:
    """What an optimizer holds."""

    by_weight: tuple[str, ...]
    numbers: dict[str, float]  # its count of steps: the same for every weight
    whole: bool  # whether these two are all of it


def states(engine: Any) -> list[tuple[Tensor, State]]:
    """Each flat part of the masters on this rank, and what the optimizer remembers of it."""
    return [(flat, _inner(engine).state[flat]) for flat in _flats(engine)]


def _inner(engine: Any) -> torch.optim.Optimizer:
    """The optimizer itself, inside of DeepSpeed's."""
    found: torch.optim.Optimizer = engine.optimizer.optimizer if _is_sharded(engine) else engine.optimizer
    return found


def _flats(engine: Any) -> list[Tensor]:
    optimizer = engine.optimizer
    if not _is_sharded(engine):  # each weight as it is
        return [weight for group in optimizer.param_groups for weight in group["params"]]
    return list(
        optimizer.fp32_partitioned_groups_flat if _is_zero3(engine) else optimizer.single_partition_of_fp32_groups
    )


def _link(engine: Any) -> None:
    """Let weights find their moments. ZeRO-2 does so once, after the first step of its first group: those of a second
    group (of norms, say, which do not decay) have none yet, and are never found.
    """
    if _is_sharded(engine) and not _is_zero3(engine):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _is_sharded(engine: Any) -> bool:
    return int(engine.zero_optimization_stage()) > 0


def _is_zero3(engine: Any) -> bool:
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def kinds(engine: Any) -> Kinds:
    """As it stands after a step."""
    _link(engine)
    by_weight: dict[str, None] = {}
    numbers: dict[str, float] = {}
    whole = True
    for flat, state in states(engine):
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0 < flat.dim():
                numbers[key] = float(value)
            elif value.shape == flat.shape and value.is_floating_point():
                by_weight[key] = None
            else:
                whole = False
    return Kinds(tuple(by_weight), numbers, whole)


def moments_of(engine: Any, model: nn.Module, key: str) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Each weight that learns, with the whole of a moment of it, in fp32. Collective, to the last of them."""
    named = list(trained(model))
    weights = [weight for _, weight in named]
    own = engine.optimizer.state if not _is_sharded(engine) else None
    found = wholes(weights, key) if own is None else (own[weight][key] for weight in weights)
    for (name, weight), moment in zip(named, found, strict=True):
        yield name, weight, moment


def set_moment(engine: Any, weight: nn.Parameter, key: str, moment: Tensor) -> None:
    if is_its_own_master(weight):
        engine.optimizer.state[weight][key].copy_(moment)
    elif _is_zero3(engine):
        safe_set_local_optimizer_state(weight, part_of(weight, moment), key)
    else:
        safe_set_full_optimizer_state(weight, moment, key)


def set_numbers(engine: Any, numbers: dict[str, float]) -> None:
    for _, state in states(engine):
        for key in numbers.keys() & state.keys():
            if isinstance(state[key], Tensor):
                state[key].fill_(numbers[key])
            else:
                state[key] = type(state[key])(numbers[key])


def of_this_rank(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the states as it is, under a name that says whose part it is of."""
    for at, (_, state) in enumerate(states(engine)):
        yield from ((f"{at}.{key}", value) for key, value in state.items() if isinstance(value, Tensor))


def wake(engine: Any) -> None:
    """Have the optimizer make its state, which it does in its first step: one with neither gradients nor a rate.

    The masters are put back behind it in any case.
    """
    optimizer, inner = engine.optimizer, _inner(engine)
    rates = [group["lr"] for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = 0.0
    held = [flat.grad for flat in _flats(engine)]
    for at, flat in enumerate(_flats(engine)):
        flat.grad = torch.zeros_like(flat)
        if _is_zero3(engine):  # which steps through its groups one by one
            optimizer._optimizer_step(at)
    if not _is_zero3(engine):
        inner.step()
    _link(engine)
    for flat, gradient in zip(_flats(engine), held, strict=True):
        flat.grad = gradient
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate
