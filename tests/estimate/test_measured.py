"""The estimate beside real phases on the CPU: within 15 % of the measured peak of every rank, and a wrong one is not.

What is measured, and how: benchmarks/memory.py, whose table is in benchmarks/README.md.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks.memory import CASES, WITHIN, measured, predicted
from phased_cpt.estimate import activations, memory

GIGABYTE = 10**9
FAST = ["every weight, bf16, ZeRO-2", "rows without checkpointing", "plain loss, large vocabulary"]
SLOW = [name for name in CASES if name not in FAST]

# What somebody might forget, in the cases where it would be seen.
Forget = Callable[[pytest.MonkeyPatch], None]


def no_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory, "_gradients", lambda model, recipe: 0)
    patch.setattr(memory, "_step", memory._end)


def no_moments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory, "remembered", lambda optimizer: 0.0)


def no_masters(patch: pytest.MonkeyPatch) -> None:
    """As if the optimizer worked on the weights themselves."""
    patch.setattr(memory, "SINGLE", 0)


def half_of_the_activations(patch: pytest.MonkeyPatch) -> None:
    whole = activations.kept_inputs
    patch.setattr(activations, "kept_inputs", lambda model, recipe: whole(model, recipe) // 2)


def logits_once(patch: pytest.MonkeyPatch) -> None:
    """In the type of the model, and not in fp32 for the loss as well."""
    patch.setattr(activations, "PLAIN", 2)
    patch.setattr(activations, "CHUNKED", 4)


def every_weight_in_four_bits(patch: pytest.MonkeyPatch) -> None:
    """The embedding and the head as well."""
    patch.setattr(memory, "weights_whole", lambda model, recipe: int(model.weights * memory.FOUR_BITS))


def never_gathered(patch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 divides everything by the ranks, and always."""
    patch.setattr(memory, "_gathered", lambda model, recipe: 0)
    patch.setattr(memory, "_step", memory._head)


FORGOTTEN: dict[str, list[Forget]] = {
    "every weight, bf16, ZeRO-2": [no_gradients, no_moments, no_masters],
    "every weight, fp32, ZeRO-2": [no_gradients, no_moments, no_masters],
    "every weight, bf16, ZeRO-3, two ranks": [no_moments, no_masters, never_gathered],
    "an adapter on a large base": [every_weight_in_four_bits],
    "QLoRA, large vocabulary": [every_weight_in_four_bits, logits_once],
    "long rows, checkpointing": [half_of_the_activations],
    "rows without checkpointing": [half_of_the_activations],
    "plain loss, large vocabulary": [logits_once],
    "chunked loss, large vocabulary": [logits_once],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[int]]]:
    """What the ranks of a case took, measured once."""
    folder = tmp_path_factory.mktemp("memory")
    return cache(lambda name: (folder, measured(CASES[name], folder)))


def held_to(found: list[int], estimate: int) -> bool:
    return all(abs(estimate - each) <= WITHIN * each for each in found)


def compared(name: str, ranks: Callable[[str], tuple[Path, list[int]]]) -> None:
    folder, found = ranks(name)
    estimate = predicted(CASES[name], folder)
    assert estimate.peak > GIGABYTE
    assert held_to(found, estimate.peak), f"{estimate} and {found}"
    for forget in FORGOTTEN[name]:
        with pytest.MonkeyPatch.context() as patch:
            forget(patch)
            wrong = predicted(CASES[name], folder).peak
        assert not held_to(found, wrong), f"{forget.__name__}: {wrong} and {found}"


@pytest.mark.parametrize("name", FAST)
def test_a_phase_takes_what_was_estimated(name: str, ranks: Callable[[str], tuple[Path, list[int]]]) -> None:
    compared(name, ranks)


@pytest.mark.heavy
@pytest.mark.parametrize("name", SLOW)
def test_every_other_phase_takes_what_was_estimated(name: str, ranks: Callable[[str], tuple[Path, list[int]]]) -> None:
    compared(name, ranks)


def test_every_case_has_something_to_forget() -> None:
    assert FORGOTTEN.keys() == CASES.keys()
