"""What is held out."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phased_cpt.data.split import Taken, held_out


def digests(count: int, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


def split(of: np.ndarray, share: float = 0.05, seed: int = 0, most: int = 10**9, always: list[int] | None = None):  # type: ignore[no-untyped-def,type-arg]
    return held_out(of, np.full(len(of), 10), share, seed, most, always or [])[0]


@pytest.mark.requirement("D-04")
def test_the_share_is_about_what_was_asked_for_and_copies_are_on_one_side() -> None:
    of = digests(20_000)
    mask = split(np.concatenate([of, of[::-1]]))
    assert mask.mean() == pytest.approx(0.05, abs=0.005)
    assert (mask[:20_000] == mask[20_000:][::-1]).all()


def test_a_larger_share_holds_out_the_same_documents_and_more() -> None:
    of = digests(5_000)
    small, large = split(of, 0.05), split(of, 0.2)
    assert (small & ~large).sum() == 0 < (large & ~small).sum()


def test_a_growing_source_moves_no_document() -> None:
    of = digests(5_000)
    assert (split(of)[:3_000] == split(of[:3_000])).all()


def test_another_seed_is_another_split() -> None:
    of = digests(5_000)
    assert (split(of, seed=0) != split(of, seed=1)).sum() > 300


@given(count=st.integers(0, 40), distinct=st.integers(1, 40), share=st.sampled_from([0.0, 0.01, 0.5, 0.99]))
def test_neither_side_is_empty_where_a_document_can_be_spared(count: int, distinct: int, share: float) -> None:
    of = digests(40)[np.arange(count) % distinct]
    mask = split(of, share)
    if not share or len(set(of.tolist())) < 2:
        assert not mask.any()
    else:
        assert mask.any()
        assert not mask.all()


def test_the_cap_is_kept_and_takes_the_first_of_the_larger_split() -> None:
    of = digests(5_000)
    capped, free = split(of, 0.2, most=500), split(of, 0.2)
    assert capped.sum() == 50
    assert not (capped & ~free).any()
    assert split(of, 0.2, most=3).sum() == 1, "one document is held out even if it is larger than the cap"


def test_a_giant_is_not_what_is_held_out_to_have_any() -> None:
    """One commit may be most of a source."""
    for seed in range(40):
        mask, _ = held_out(digests(5, seed), np.array([5, 50_000, 5, 5, 5]), 1e-9, 0, 10**9, [])
        assert mask.sum() == 1
        assert not mask[1]


def test_a_document_that_was_taken_to_have_any_stays_held_out_when_the_source_grows(tmp_path: Path) -> None:
    of = digests(4_000)
    few = of[split(of, 0.05) == 0][:3]
    taken = Taken(tmp_path / "split.json", seed=0)
    mask, new = held_out(few, np.full(3, 10), 0.05, 0, 10**9, taken.read())
    taken.add(new)
    assert few[mask].tolist() == new
    grown = np.concatenate([few, of])
    mask, newer = held_out(grown, np.full(len(grown), 10), 0.05, 0, 10**9, taken.read())
    assert mask[:3].tolist() == [digest in new for digest in few.tolist()]
    assert newer == []
    assert not held_out(grown, np.full(len(grown), 10), 0.05, 0, 10**9, [])[0][:3].any(), "the control"
    assert Taken(tmp_path / "split.json", seed=1).read() == [], "each seed has its own"
