"""What is asserted of a phase in training says the truth, and by name."""

from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import Phases
from tests.zygote import Zygote

LABELS = [63, 2, 1, 0, 40, 63, 0, 3]


@pytest.mark.requirement("K-06")
def test_a_leak_between_documents_is_measured(zygote: Zygote, tmp_path: Path) -> None:
    """0 on attentions that keep them apart; about 1 where the mask is thrown away, or no position is listened to."""
    found = zygote.call("tests.train.programs:leaks", folder=tmp_path)
    alike = ["llama, eager", "llama, sdpa", "gpt2, eager", "gpt2, sdpa"]
    assert {name: found.pop(name) for name in alike} == pytest.approx(dict.fromkeys(alike, 0.0), abs=1e-6)
    assert found.pop("llama, deaf") == 1.0
    assert {name: share > 0.3 for name, share in found.items()} == {"llama, maskless": True, "gpt2, maskless": True}


@pytest.mark.requirement("T-04")
def test_a_weight_without_a_gradient_is_named(zygote: Zygote, tmp_path: Path) -> None:
    forgotten, routed, none = zygote.call("tests.train.programs:reached", folder=tmp_path)
    assert forgotten == "no gradient reaches forgotten.weight: these weights would never learn"
    assert routed == ["experts.weight", "experts.bias"], "experts may rest, and are told"
    assert none == [], "the control: all of them are used"


A, B = "q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight"
MOVES = [
    ({A: [4, 8], B: [8, 4]}, [], 1, None),
    ({A: [4, 8], B: [8, 4]}, [A], 1, None),  # B is 0, and so is the gradient of A
    ({A: [4, 8], B: [8, 4]}, [A], 2, A),
    ({A: [4, 8], B: [8, 4]}, [B], 1, B),
    ({"mlp.weight": [8, 8], "mlp.up.weight": [8, 8]}, ["mlp.weight"], 1, "mlp.weight"),
    ({"mlp.experts.3.weight": [8, 8]}, ["mlp.experts.3.weight"], 2, None),
    ({"norm.weight": [8], "mlp.weight": [8, 8]}, ["norm.weight"], 1, None),  # ones move from a rate of 3e-8 on
    ({"norm.weight": [8], "mlp.weight": [8, 8]}, ["norm.weight", "mlp.weight"], 1, "mlp.weight"),
    ({"q_proj.lora_magnitude_vector.weight": [8]}, ["q_proj.lora_magnitude_vector.weight"], 1, None),
]


@pytest.mark.parametrize(("shapes", "still", "step", "named"), MOVES)
def test_a_weight_that_does_not_move_is_named(
    shapes: dict[str, Any], still: list[str], step: int, named: str | None, zygote: Zygote, tmp_path: Path
) -> None:
    said = zygote.call("tests.train.programs:moved", shapes, still, step, folder=tmp_path)
    assert said == (
        named
        and f"step {step} has not moved {named}; the learning rate may be too small to be seen in fp32, or these "
        "layers are not used"
    )


def test_a_frozen_weight_that_moves_on_one_rank_is_noticed_by_all(phases: Phases) -> None:
    moves = [{"labels": LABELS, "stage": stage, "moves_base_of_rank": 1, "unevaluated": True} for stage in (2, 3)]
    *moved, control = phases(*moves, {"labels": LABELS, "unevaluated": True}, ranks=2)
    words = (1, "the base has changed during training, and it should be frozen; nothing is published")
    assert [each.failed for each in moved] == [[words, words], [words, words]]
    assert control.failed == [None, None]


def test_a_full_phase_may_warm_up_from_a_rate_that_ones_do_not_feel(phases: Phases) -> None:
    """1 − 2e-8 is 1 in fp32: so begins a warm-up of 500 steps to 1e-5, and nothing is wrong with it."""
    how = {"labels": LABELS, "lora": {"enabled": False}, "unevaluated": True}
    slow, stuck = phases(
        {**how, "training": {"learning_rate": 4e-8, "warmup_steps": 1}},
        {**how, "training": {"learning_rate": 1e-30, "warmup_steps": 1}},
    )
    assert slow.failed == [None]
    ((code, words),) = stuck.failed  # type: ignore[misc]
    assert code == 1 and words.startswith("step 1 has not moved model.embed_tokens.weight"), "the control"
