"""A step of training means the same on any number of ranks, in any micro batch, under any ZeRO stage."""

from collections import Counter
from typing import Any

import pytest
import torch

from phased_cpt.schedule import Schedule
from tests.train.conftest import Phases, Plain, apart
from tests.train.shapes import SHAPE

UNEVEN = [63, 2, 1, 0, 40, 63, 0, 3, 63, 63, 20, 10, 5, 7, 63, 1]  # labels of each row; two steps of eight are an epoch
LOSS, WEIGHT = 5e-7, 1e-6  # how far losses may be apart (as a share), and weights that have moved by 2e-3
EVERY_WEIGHT = 5e-6  # of those that have moved by 3e-4: Adam makes whole steps of a gradient that is nearly nothing
THREE = {"stage": 3}
NO_DROPOUT = {"lora": {"dropout": 0.0}}


def alike(losses: list[float], others: list[float]) -> bool:
    return losses == pytest.approx(others, rel=LOSS)


def test_zero_2_and_zero_3_on_one_rank_and_two_are_a_loop_of_plain_torch(phases: Phases, plain: Plain) -> None:
    """With dropout, and with activations computed twice; the losses of four steps, and the adapter at their end.

    The plain loop divides the summed loss of a step by its labels. What would go unnoticed otherwise is beside it:
    dropout that depends on who draws it, and a mean of the means of micro batches.
    """
    spec: dict[str, Any] = {"labels": UNEVEN, "unevaluated": True}
    ((losses, weights),) = plain(spec)
    same = [spec, spec | THREE, spec | {"training": {"gradient_checkpointing": False}}]
    for ranks in (1, 2):
        *found, unseeded, means = phases(
            *same, spec | {"instead": ["unseeded"]}, spec | {"instead": ["mean of means"]}, ranks=ranks
        )
        for each in found:
            assert alike(each.losses, losses)
            assert apart(each.weights, weights) <= WEIGHT
        assert apart(unseeded.weights, weights) > 100 * WEIGHT
        assert not alike(means.losses, losses) and apart(means.weights, weights) > 100 * WEIGHT


@pytest.mark.requirement("T-02")
def test_accumulation_is_one_big_batch(phases: Phases) -> None:
    """63/2/1/0/40/63/0/3 labels a row, in micro batches of 1, 2, 4 and 8; on two ranks the fourth of 1 has no label."""
    sizes = [{"labels": UNEVEN, "unevaluated": True, "training": {"micro_batch_size": size}} for size in (1, 2, 4, 8)]
    one, *others = phases(*(size | NO_DROPOUT for size in sizes))
    means = sizes[0] | NO_DROPOUT | {"instead": ["mean of means"]}
    *two_ranks, wrong = phases(*(size | NO_DROPOUT for size in sizes[:3]), means, ranks=2)
    for other in [*others, *two_ranks]:
        assert alike(other.losses, one.losses)
        assert apart(other.weights, one.weights) <= WEIGHT
    assert apart(wrong.weights, one.weights) > 100 * WEIGHT, "the control: a mean of means"


def test_a_rank_without_any_label_takes_part(phases: Phases, plain: Plain) -> None:
    """Rows 2, 3, 6, 7 of every eight are those of rank 1."""
    spec = {"labels": [63, 63, 0, 0, 63, 63, 0, 0], "unevaluated": True} | NO_DROPOUT
    unshuffled = {"data": {"shuffle": False}}
    found = phases(spec | unshuffled, spec | unshuffled | THREE, ranks=2)
    for each in found:
        assert all(not any(labels) for _, _, labels in each.of_ranks[1]["seen"]), "as it should be for this test"
    (alone,) = phases(spec | unshuffled)
    for each in found:
        assert alike(each.losses, alone.losses)
        assert apart(each.weights, alone.weights) <= WEIGHT


def test_a_step_without_any_label_is_no_disaster(phases: Phases) -> None:
    """Rows of documents of one token have none; 0 / 0 is no reason to stop a run of days."""
    spec = {"labels": [63, 0], "training": {"micro_batch_size": 1, "global_batch_size": 1}, "unevaluated": True}
    (found,) = phases(spec | {"data": {"shuffle": False}, "phase": {"max_steps": 4}})
    assert found.failed == [None]
    assert [loss == 0 for loss in found.losses] == [False, True, False, True]


# The order of the rows ------------------------------------------------------------------------------------------------

ELEVEN = [63, 2, 1, 9, 40, 63, 7, 3, 63, 63, 20]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_block_is_trained_once_an_epoch_and_the_end_is_filled_with_empty_rows(phases: Phases, ranks: int) -> None:
    """2 epochs of 11 rows in batches of 8: 22 rows, and 2 without a label; no row is trained a third time."""
    spec = {"labels": ELEVEN, "phase": {"epochs": 2}, "unevaluated": True}
    found = phases(*(spec | {"training": {"micro_batch_size": size}} for size in (1, 2, 4)), ranks=ranks)
    for each in found:
        rows = [
            (step, at, count) for step, places, labels in each.seen() for at, count in zip(places, labels, strict=True)
        ]
        assert [at for _, at, _ in sorted(rows)] == list(range(24)), "each place once"
        assert all(step == 1 + at // 8 for step, at, _ in rows), "in its step"
        assert each.order[22:] == [-1, -1]
        assert Counter(each.order[:11]) == Counter(each.order[11:22]) == Counter(range(11))
        assert all(count == (ELEVEN[each.order[at]] if at < 22 else 0) for _, at, count in rows)
        assert each.order == found[0].order


def test_the_empty_rows_change_nothing(phases: Phases, plain: Plain) -> None:
    """1 epoch of 11 rows: the plain loop has a last batch of three."""
    spec = {"labels": ELEVEN, "phase": {"epochs": 1}, "unevaluated": True} | NO_DROPOUT
    (losses, weights), (repeated, others) = plain(spec, spec | {"phase": {"max_steps": 2}})
    for ranks in (1, 2):
        for found in phases(spec, spec | THREE, ranks=ranks):
            assert alike(found.losses, losses)
            assert apart(found.weights, weights) <= WEIGHT
    assert not alike(repeated, losses) and apart(others, weights) > 100 * WEIGHT, "the control: rows of a next epoch"


# The learning rate ----------------------------------------------------------------------------------------------------


@pytest.mark.requirement("T-02", "S-07")
def test_the_learning_rate_of_a_step_is_that_of_the_plan(phases: Phases) -> None:
    shapes = {
        "cosine": Schedule("cosine", 1e-3, 6, warmup_steps=2, min_ratio=0.1),
        "linear": Schedule("linear", 1e-3, 6, warmup_steps=2, min_ratio=0.1),
        "constant": Schedule("constant", 1e-3, 6, warmup_steps=2),
        "wsd": Schedule("wsd", 1e-3, 6, warmup_steps=2, decay_steps=3, min_ratio=0.1),
    }
    how = {"warmup_steps": 2, "min_lr_ratio": 0.1, "decay_ratio": 0.5, "global_batch_size": 2}
    specs = [
        {"labels": UNEVEN, "phase": {"max_steps": 6}, "training": {**how, "lr_scheduler": shape}, "unevaluated": True}
        for shape in shapes
    ]
    for found, schedule in zip(phases(*specs), shapes.values(), strict=True):
        expected = [schedule.rate(step - 1) for step in range(1, 7)]
        assert [line["learning_rate"] for line in found.lines] == pytest.approx(expected, rel=1e-14)
        assert len(set(expected)) > 2, "it is no line that anything would match"


# What is not finite ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_every_rank_before_the_update(phases: Phases) -> None:
    """Places 0 1 | 2 3 | 4 5 | 6 7 of a step: rank 0, rank 1, rank 0, rank 1. Even places get an infinity, others NaN."""
    spec = {"labels": UNEVEN, "unevaluated": True}
    places = ([0], [7], [2, 5])
    first = [spec | {"not_finite": each, "stage": stage} for each in places for stage in (2, 3)]
    *stopped, unchecked = phases(*first, spec | {"not_finite": [7], "instead": ["unchecked"]}, ranks=2)
    for each, at in zip(stopped, [each for each in places for _ in (2, 3)], strict=True):
        (code, words), other = each.failed  # type: ignore[misc]
        assert (code, words) == other, "on every rank, in the same words"
        batches = sorted(each.order[place] for of in at for place in (of - of % 2, of - of % 2 + 1))
        assert code == 5 and f"step 1: the loss is not finite (blocks {', '.join(map(str, batches))};" in words
        assert [rank["unmoved"] for rank in each.of_ranks] == [True, True]
        assert each.lines == []
    assert [line["step"] for line in unchecked.lines] == [1], (
        "the control: nobody looks at the loss, and the step is taken"
    )
    assert all(each and "step 1: the gradient is not finite" in each[1] for each in unchecked.failed)


def test_a_gradient_that_is_not_finite_stops_every_rank_too(phases: Phases) -> None:
    """The second net: as if the loss had been a number and its gradient none."""
    spec = {"labels": UNEVEN, "unevaluated": True, "not_finite": [7], "instead": ["unchecked"]}
    for found in phases(spec, spec | {"stage": 3}, ranks=2):
        assert [each and each[0] for each in found.failed] == [5, 5]
        assert found.failed[0] and "step 1: the gradient is not finite" in found.failed[0][1]


def test_the_steps_before_it_are_kept_as_they_were(phases: Phases) -> None:
    spec = {"labels": UNEVEN, "unevaluated": True}
    second = [spec | {"not_finite": [place]} for place in (8, 15)]
    found = phases(*second)
    assert [[line["step"] for line in each.lines] for each in found] == [[1], [1]]
    assert apart(found[0].weights, found[1].weights) == 0
    assert all(torch.isfinite(weight).all() for each in found for weight in each.weights.values())


# Odd sizes ------------------------------------------------------------------------------------------------------------

ODD: dict[str, dict[str, Any]] = {
    "an odd global batch": {"labels": UNEVEN, "training": {"micro_batch_size": 1, "global_batch_size": 7}},
    "an odd micro batch": {"labels": UNEVEN, "training": {"micro_batch_size": 5, "global_batch_size": 5}},
    "a micro batch larger than the data": {
        "labels": [63, 5, 20],
        "training": {"micro_batch_size": 8, "global_batch_size": 8},
        "phase": {"epochs": 1},
    },
    "one block": {"labels": [63], "training": {"micro_batch_size": 1, "global_batch_size": 2}, "phase": {"epochs": 3}},
    "one step": {"labels": UNEVEN, "phase": {"max_steps": 1}, "training": {"warmup_steps": 0}},
    "no clipping": {"labels": UNEVEN, "training": {"max_grad_norm": None}},
}


@pytest.mark.parametrize("stage", [2, 3])
def test_odd_sizes_are_trained_as_any_others(stage: int, phases: Phases, plain: Plain) -> None:
    specs = [{**NO_DROPOUT, "unevaluated": True, "stage": stage, **odd} for odd in ODD.values()]
    for name, found, (losses, weights) in zip(ODD, phases(*specs), plain(*specs), strict=True):
        assert alike(found.losses, losses), name
        assert apart(found.weights, weights) <= WEIGHT, name


@pytest.mark.requirement("T-11")
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_of_a_model_can_be_trained(tied: bool, phases: Phases, plain: Plain) -> None:
    """Also under ZeRO-3, and with a head that is the embedding at the same time."""
    how = {"labels": UNEVEN, "lora": {"enabled": False}, "unevaluated": True, "training": {"learning_rate": 1e-4}}
    spec = how | {"model": {"from_config": {**SHAPE, "tie_word_embeddings": tied}}}
    ((losses, weights),) = plain(spec)
    assert ("lm_head.weight" in weights) != tied
    *found, means = [
        *phases(spec, spec | THREE),
        *phases(spec, spec | THREE, spec | {"instead": ["mean of means"]}, ranks=2),
    ]
    for each in found:
        assert each.failed == [None] * len(each.of_ranks)
        assert alike(each.losses, losses)
        assert apart(each.weights, weights) <= EVERY_WEIGHT
    assert apart(means.weights, weights) > 20 * EVERY_WEIGHT, "the control"
