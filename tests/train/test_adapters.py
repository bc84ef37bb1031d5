"""Adapters of other kinds under a real engine: any ZeRO stage and any number of ranks train the same weights."""

from typing import Any

import pytest
import torch

from tests.train.conftest import Phases, apart
from tests.train.test_trainer import THREE, UNEVEN, WEIGHT, alike

HOW: dict[str, Any] = {"labels": UNEVEN, "unevaluated": True}
TIGHT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True, "alpha": 4, "init": "gaussian"}])
def test_every_kind_learns_the_same_under_any_stage_on_any_ranks(kind: dict[str, Any], phases: Phases) -> None:
    """ZeRO-3 has let go of the base's weight when DoRA asks for its lengths, and has to bring it back."""
    spec = HOW | {"lora": kind}
    one, three = phases(spec, spec | THREE)
    two, tight, plain = phases(spec, spec | THREE | {"zero": TIGHT}, HOW, ranks=2)
    for other in (three, two, tight):
        assert other.failed == [None] * len(other.of_ranks)
        assert alike(other.losses, one.losses)
        assert apart(other.weights, one.weights) <= WEIGHT
    assert not alike(plain.losses, one.losses), "the control: plain LoRA is another"


def test_the_lengths_of_dora_do_not_decay(phases: Phases) -> None:
    """They are those of the base's own rows: a decay of 1 a step at this rate would halve the model in seven hundred."""
    long = HOW | {"phase": {"max_steps": 4}, "lora": {"use_dora": True, "dropout": 0.0}}
    decays, none = phases(*(long | {"training": {"weight_decay": decay}} for decay in (10.0, 0.0)))
    off = {name: float((decays.weights[name] - none.weights[name]).abs().max()) for name in none.weights}
    lengths = [name for name in off if "lora_magnitude_vector" in name]
    drawn = [name for name in off if ".lora_A." in name]
    assert len(lengths) == len(drawn) == 14
    assert max(off[name] for name in lengths) < 1e-4, "they differ by what A and B differ by"
    assert min(off[name] for name in drawn) > 1e-3, "the control: A has decayed"


@pytest.mark.parametrize("stage", [2, 3])
def test_of_lora_plus_b_learns_so_many_times_as_fast(stage: int, phases: Phases) -> None:
    """In the first step of Adam a weight moves by its rate; A has no gradient in it, and B began at zero."""
    spec = HOW | {"stage": stage, "phase": {"max_steps": 1}, "training": {"weight_decay": 0.0, "warmup_steps": 0}}
    plain, fast = phases(spec, spec | {"training": {**spec["training"], "lora_plus_ratio": 16}}, ranks=2)
    for name, weight in plain.weights.items():
        if ".lora_B." in name:
            moved = weight.abs() > 9e-4  # where the gradient is more than Adam's epsilon
            assert moved.any() and torch.allclose(fast.weights[name][moved], 16 * weight[moved], rtol=1e-4)
        else:
            assert torch.equal(fast.weights[name], weight)
    assert [line["learning_rate"] for line in fast.lines] == [line["learning_rate"] for line in plain.lines], "A's"
    assert fast.lines[0]["learning_rate"] == pytest.approx(1e-3, rel=1e-12)


def test_how_strongly_an_adapter_counts_is_told_before_it_trains(phases: Phases) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "LoRA of rank 4, scaled by 2": {},
        "rsLoRA of rank 16, scaled by 2": {"r": 16, "alpha": 8, "use_rslora": True},
        "rsDoRA of rank 4, scaled by 1.5": {"alpha": 3, "use_rslora": True, "use_dora": True},
    }
    for words, found in zip(kinds, phases(*(HOW | {"lora": lora} for lora in kinds.values())), strict=True):
        assert any(message.endswith(f"; {words}") for message in found.told), found.told
