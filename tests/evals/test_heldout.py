"""The held-out loss is one number: for any ranks, batch and ZeRO stage; and measuring it changes nothing."""

import math
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.evals.heldout import Measured
from tests.train.conftest import Phases, apart
from tests.train.shapes import SHAPE

LABELS = [63, 2, 1, 5, 40, 63, 7, 3]
HELD_OUT = {  # labels of each row; several sets, measured in one pass
    "one": [63, 5, 1, 20, 63, 2, 32],
    "two": [10, 63, 63, 1, 4, 0, 7, 9, 63, 50, 41, 2, 63],
    "three": [17],
}
TOKENS = {"one": 186, "two": 376, "three": 17}
SIZES = [1, 2, 3, 8]
# Its matrices have whole blocks of 64 weights in a row, or nothing would be packed.
FOUR_BITS = {
    "use_4bit": True,
    "precision": "bf16",
    "from_config": {**SHAPE, "hidden_size": 64, "intermediate_size": 128},
}


@pytest.mark.requirement("E-01")
def test_the_held_out_loss_is_the_same_on_any_ranks_in_any_batch(phases: Phases) -> None:
    """Sets of 7, 13 and 1 rows: on two ranks one of them has nothing left at the end, and takes part all the same."""
    spec: dict[str, Any] = {"labels": LABELS, "held_out": HELD_OUT, "batches": SIZES}
    every = [*phases(spec | {"one_by_one": True}, spec | {"stage": 3}), *phases(spec, spec | {"stage": 3}, ranks=2)]
    alone = every[0].of_ranks[0]["evaluations"]["one by one"]
    for found in every:
        assert found.failed == [None] * len(found.of_ranks)
        for rank in found.of_ranks:
            for size in map(str, SIZES):
                measured = rank["evaluations"]["found"][size]
                assert {name: tokens for name, (_, tokens) in measured.items()} == TOKENS
                losses = {name: loss for name, (loss, _) in measured.items()}
                assert losses == pytest.approx({name: loss for name, (loss, _) in alone.items()}, rel=1e-6)
            assert rank["evaluations"]["same modes"] and rank["evaluations"]["same random numbers"]
            assert rank["evaluations"]["found"] == found.of_ranks[0]["evaluations"]["found"], "every rank knows it"
    for name in ("one", "two"):
        assert abs(alone[name][0] - alone[name][1]) > 1e-3, "the control: a mean over rows is another number"


def test_an_evaluation_moves_no_weight(phases: Phases) -> None:
    """With dropout on: the random numbers of the training are its own."""
    spec = {"labels": LABELS, "evaluation": {"every_steps": 1}}
    often, never = phases(spec, spec | {"unevaluated": True})
    assert len(often.measured) == 5 and never.measured == []
    assert apart(often.weights, never.weights) == 0
    assert often.losses == never.losses


def test_an_evaluation_moves_no_4_bit_weight(phases: Phases) -> None:
    """On a CPU with bf16 kernels, bitsandbytes packs 4-bit weights anew in eval mode, and what it unpacks are others."""
    spec = {"labels": LABELS, "evaluation": {"every_steps": 1}, "model": FOUR_BITS}
    often, never, packed = phases(spec, spec | {"unevaluated": True}, spec | {"instead": ["eval mode for all"]})
    assert apart(often.weights, never.weights) == 0
    assert often.losses == never.losses
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU packs nothing, so there is no control")
    assert apart(packed.weights, never.weights) > 0, "the control: bitsandbytes' modules in eval mode, too"


def test_a_perplexity_that_is_no_number_is_none() -> None:
    assert Measured(math.log(8), 3).perplexity == pytest.approx(8)
    assert [Measured(loss, 3).perplexity for loss in (701.0, math.inf, math.nan)] == [None, None, None]
    assert Measured(699.0, 3).perplexity is not None
