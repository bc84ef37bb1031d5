"""Every token of every document is trained exactly once, or counted; whatever the lengths, the overlap, the packer."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phased_cpt.data.account import account_of
from phased_cpt.data.blocks import IGNORED
from phased_cpt.data.chunks import Slices
from phased_cpt.data.packing import PACKERS, Packed, _borders
from tests.data.shapes import EOS, PAD, Prepared


@st.composite
def cases(draw: st.DrawFn) -> Prepared:
    capacity = draw(st.integers(2, 12))
    return Prepared(
        lengths=draw(st.lists(st.integers(1, 40), min_size=1, max_size=12)),
        capacity=capacity,
        overlap=draw(st.integers(0, capacity - 1)),
        packer=draw(st.sampled_from(sorted(PACKERS))),
        chunk_long=draw(st.booleans()),
        train_context=draw(st.booleans()),
        keep_order=draw(st.booleans()),
    )


@pytest.mark.requirement("K-04", "K-11")
@given(case=cases())
def test_tokens_in_are_tokens_trained_first_or_dropped(case: Prepared) -> None:
    """The account agrees with the rows themselves, counted one by one."""
    rows, account = case.rows, case.account
    labels = sum(int((row["labels"] != IGNORED).sum()) for row in rows)
    padded = sum(int((row["input_ids"] == PAD).sum()) for row in rows)
    assert labels == account.tokens_trained
    assert padded == account.tokens_padded
    assert account.tokens_source == len(case.tokens)
    assert account.tokens_source + account.tokens_repeated == labels + account.tokens_first + account.tokens_dropped
    positions = sum(len(row["input_ids"]) for row in rows)
    assert positions == account.tokens_source - account.tokens_dropped + account.tokens_context + padded
    assert all(len(values) == case.shape.max_tokens for row in rows for values in row.values())  # type: ignore[attr-defined]


@given(case=cases())
def test_no_token_is_trained_twice_and_none_is_lost(case: Prepared) -> None:
    """T3: tokens all differ, so a label says which one it is; an EOS is known by the token before it."""
    seen: Counter[int] = Counter()
    for row in case.rows:
        seen.update(row["labels"][(row["labels"] != IGNORED) & (row["labels"] != EOS)].tolist())
    if not case.shape.train_context:
        assert max(seen.values(), default=1) == 1
    everywhere = np.concatenate([row["input_ids"] for row in case.rows] or [np.empty(0, np.int64)])
    lost = set(case.tokens.tolist()) - set(everywhere.tolist())
    assert len(lost - {EOS}) <= case.account.tokens_dropped
    assert case.account.tokens_dropped or not lost


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    capacity=st.integers(2, 12),
    overlap=st.integers(0, 11),
)
def test_a_single_token_of_overlap_saves_every_label_but_the_first(
    lengths: list[int], capacity: int, overlap: int
) -> None:
    """T3: without overlap each window loses the label of its first token, with any only each document does."""
    case = Prepared(lengths, capacity, min(overlap, capacity - 1))
    lost = case.account.chunks if min(overlap, capacity - 1) == 0 else len(lengths)
    assert case.account.tokens_trained == sum(lengths) - lost


@given(case=cases())
def test_positions_restart_at_every_document_and_labels_are_the_inputs(case: Prepared) -> None:
    for at, row in enumerate(case.rows):
        pieces = case.blocks.slices_of(at)
        begins = np.flatnonzero(row["position_ids"] == 0)
        padding = [int(pieces.length.sum())] if pieces.length.sum() < case.shape.max_tokens else []
        assert begins.tolist() == [*(np.cumsum(pieces.length) - pieces.length).tolist(), *padding]
        assert (np.diff(row["position_ids"])[np.diff(row["position_ids"]) != 1] <= 0).all()
        labelled = row["labels"] != IGNORED
        assert (row["labels"][labelled] == row["input_ids"][labelled]).all()
        assert not labelled[begins].any(), "nothing to predict the first token from"


@pytest.mark.requirement("K-02")
@given(length=st.integers(1, 200), capacity=st.integers(2, 20), overlap=st.integers(0, 19))
def test_windows_overlap_by_what_is_said_and_none_is_only_overlap(length: int, capacity: int, overlap: int) -> None:
    overlap = min(overlap, capacity - 1)
    pieces = Prepared([length], capacity, overlap, "none").packed.slices
    assert (pieces.context[1:] == overlap).all()
    assert pieces.context[0] == 0
    assert (pieces.length > pieces.context).all()
    assert (pieces.start[1:] == pieces.start[:-1] + pieces.length[:-1] - overlap).all()
    assert pieces.start[-1] + pieces.length[-1] == length
    assert (pieces.length[:-1] == capacity).all()


@pytest.mark.requirement("K-03")
def test_a_document_that_is_shortened_keeps_its_end_and_is_counted() -> None:
    case = Prepared([9, 3], 5, chunk_long=False)
    assert [row["input_ids"].tolist() for row in case.rows] == [[10, 11, 12, 13, EOS], [19, 20, EOS, PAD, PAD]]
    assert case.rows[0]["labels"].tolist() == [IGNORED, 11, 12, 13, EOS]
    assert (case.account.tokens_dropped, case.account.documents_shortened) == (4, 1)
    whole = Prepared([9, 3], 5)
    assert (whole.account.tokens_dropped, whole.account.documents_shortened) == (0, 0), "the control"


def test_context_is_trained_again_only_if_asked_for() -> None:
    masked, counted = (Prepared([9], 6, 3, train_context=again) for again in (False, True))
    assert masked.rows[1]["labels"].tolist() == [IGNORED] * 3 + [16, 17, EOS]
    assert counted.rows[1]["labels"].tolist() == [IGNORED, 14, 15, 16, 17, EOS]
    assert (counted.account.tokens_repeated, masked.account.tokens_repeated) == (2, 0)


@pytest.mark.parametrize("lie", ["loses a slice", "says it dropped", "overfills"])
def test_a_packer_that_lies_is_caught(lie: str) -> None:
    """The identities are checked each time, and not only here."""
    case = Prepared([5, 4, 6], 6)
    packed = case.packed
    if lie == "loses a slice":
        packed = Packed(packed.slices[slice(0, 2)], packed.first[:3])
    elif lie == "says it dropped":
        packed = Packed(packed.slices, packed.first, dropped=1)
    else:
        packed = Packed(packed.slices, np.array([0, 2, 2, 3]))
    documents = Slices.of_documents(np.zeros(3, np.int64), np.array([0, 5, 9]), np.array([5, 4, 6]))
    with pytest.raises(AssertionError, match="tokens"):
        account_of(documents, documents, packed, case.shape)
    account_of(documents, documents, case.packed, case.shape)  # the control


def test_efficiency_is_the_share_of_positions_that_hold_a_token() -> None:
    assert Prepared([5, 3], 10).account.efficiency == pytest.approx(0.8)
    assert Prepared([12], 10, 4, "none").account.efficiency == pytest.approx(16 / 20), "context is no padding"


def test_a_document_that_just_fits_is_not_shortened() -> None:
    assert Prepared([6, 7], 6, chunk_long=False).account.documents_shortened == 1


def test_a_last_row_that_is_full_is_not_dropped() -> None:
    assert Prepared([4, 4], 4, packer="concat").account.tokens_dropped == 0
    assert Prepared([4, 5], 4, packer="concat").account.tokens_dropped == 1


@given(lengths=st.lists(st.integers(1, 60), max_size=8), capacity=st.integers(2, 12), overlap=st.integers(0, 11))
def test_borders_that_are_found_at_once_are_those_found_one_by_one(
    lengths: list[int], capacity: int, overlap: int
) -> None:
    overlap = min(overlap, capacity - 1)
    starts = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    borders, at, total = [], 0, sum(lengths)
    while at < total:
        borders.append(at)
        at += capacity - min(at - int(starts[starts <= at].max()), overlap)
    assert _borders(starts, total, capacity, overlap).tolist() == [*borders, total]
