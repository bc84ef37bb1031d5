"""A phase's digest holds all that it was made of, and the phases before it."""

from collections.abc import Callable

import pytest

from phased_cpt.config import Loaded
from phased_cpt.ledger.fingerprint import Adapter, Inputs, Weights, differences, fingerprint_of
from phased_cpt.plan import Plan, make_plan
from tests.conftest import MINIMAL

BASE = Weights(kind="base", base="b" * 64)
INPUTS = Inputs(start=BASE, tokenizer="t" * 64, sources={"sources.0": "s" * 64})


@pytest.fixture
def plan(loaded: Callable[..., Loaded]) -> Callable[..., Plan]:
    return lambda *overrides: make_plan(loaded(MINIMAL, "launch.num_gpus=1", *overrides))


def chain(plan: Plan) -> list[str]:
    """The fingerprints of all phases, if each published what its fingerprint says."""
    digests: list[str] = []
    start = BASE
    for phase in plan.phases:
        digests.append(fingerprint_of(phase, INPUTS.model_copy(update={"start": start})).digest)
        start = Weights(kind="adapter", base=BASE.base, adapters=(Adapter(digest=digests[-1], folder="f"),))
    return digests


def test_the_same_run_has_the_same_fingerprints(plan: Callable[..., Plan]) -> None:
    assert chain(plan()) == chain(plan())


def test_editing_an_early_phase_renames_the_later_ones(plan: Callable[..., Plan]) -> None:
    before, after = chain(plan()), chain(plan("phases.foundation.epochs=2"))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_editing_a_late_phase_leaves_the_earlier_ones(plan: Callable[..., Plan]) -> None:
    before, after = chain(plan()), chain(plan("phases.evolution.epochs=2"))
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    "change",
    [
        {"start": Weights(kind="base", base="c" * 64)},
        {"start": Weights(kind="adapter", base="b" * 64, adapters=(Adapter(digest="a" * 64),))},
        {"tokenizer": "u" * 64},
        {"sources": {"sources.0": "r" * 64}},
        {"sources": {"sources.0": "s" * 64, "sources.1": "s" * 64}},
    ],
)
def test_every_input_counts(plan: Callable[..., Plan], change: dict[str, object]) -> None:
    phase = plan().phases[0]
    assert fingerprint_of(phase, INPUTS.model_copy(update=change)).digest != fingerprint_of(phase, INPUTS).digest


def test_where_an_adapter_lies_does_not_count_but_its_scale_and_order_do() -> None:
    def digest(*adapters: Adapter) -> str:
        return Weights(kind="adapter", base="b", adapters=adapters).digest

    one, two = Adapter(digest="1", folder="x"), Adapter(digest="2", folder="y")
    assert digest(one, two) == digest(one.model_copy(update={"folder": "moved"}), two)
    assert (
        len({digest(one, two), digest(two, one), digest(one), digest(one, two.model_copy(update={"scale": 0.5}))}) == 4
    )


def test_differences_show_the_old_and_the_new_value() -> None:
    assert differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 6}) == {
        "b": (2, 5),
        "c": (3, None),
        "d": (None, 6),
    }
