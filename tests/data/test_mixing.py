"""Draws that depend on their seeds alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phased_cpt.data.mixing import drawn, row_order, shuffled


@pytest.mark.parametrize(("weight", "total"), [(1, 100), (0.5, 50), (2.5, 250), (1.25, 125), (0.001, 1), (0.125, 13)])
def test_a_weight_is_how_often_documents_are_seen(weight: float, total: int) -> None:
    """A weight of 0.5 that drops its source, and 2.5 that is 2, are what other mixers do."""
    times = np.bincount(drawn(100, weight, "seed"), minlength=100)
    assert times.sum() == total
    assert set(times) <= {int(weight), int(weight) + 1}


def test_which_half_depends_on_the_seed_and_on_nothing_else() -> None:
    first, again, other = (drawn(1000, 0.5, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert first == sorted(first), "in the order of the source"
    assert 200 < len(set(first) & set(other)) < 300


def test_the_order_is_the_same_on_every_machine_and_for_ever() -> None:
    assert shuffled(10, "order", 42, "foundation").tolist() == [9, 1, 0, 3, 6, 7, 2, 5, 4, 8]


@pytest.mark.requirement("D-07")
@given(rows=st.integers(1, 50), epochs=st.sampled_from([0.5, 1.0, 2.0, 2.3]))
def test_every_epoch_sees_every_row_once(rows: int, epochs: float) -> None:
    order = row_order(rows, epochs, 7)
    assert len(order) == int(np.ceil(np.round(epochs * rows, 9)))
    for begin in range(0, len(order), rows):
        part = order[begin : begin + rows]
        assert len(set(part.tolist())) == len(part)
    kept = row_order(rows, epochs, 7, shuffle=False)
    assert kept.tolist() == [at % rows for at in range(len(order))]


def test_epochs_are_counted_in_fractions_and_not_in_floats() -> None:
    assert len(row_order(10, 1.1, 7)) == 11, "1.1 × 10 is 11.000000000000002 in floats"


def test_epochs_have_orders_of_their_own() -> None:
    order = row_order(100, 2, 7)
    assert order[:100].tolist() != order[100:].tolist()
    assert order[:100].tolist() == row_order(100, 1, 7).tolist(), "more epochs leave the first one as it was"
