"""How documents fill blocks: drawn, and held to the laws that were published for it."""

import numpy as np
import pytest

from phased_cpt.data.packing import BLOCKS_IN_A_GROUP, PACKERS, best_fit
from tests.conftest import REPOSITORY
from tests.data.shapes import Prepared


def cut_documents(prepared: Prepared) -> int:
    """Documents that lie in more than one slice."""
    ends = np.cumsum(np.bincount(np.searchsorted(np.flatnonzero(prepared.tokens == 1), prepared.packed.slices.start)))
    return int((np.diff(ends, prepend=0) > 1).sum())


@pytest.mark.requirement("K-05")
@pytest.mark.parametrize(
    ("packer", "overlap", "drawing"),
    [
        ("best_fit", 0, ["AAAAA.", "BBDDDD", "CCC..."]),
        ("concat", 0, ["AAAAAB", "BCCCDD"]),
        ("pad", 0, ["AAAAAB", "BCCCDD", "DD...."]),
        ("none", 0, ["AAAAA.", "BB....", "CCC...", "DDDD.."]),
        ("pad", 2, ["AAAAAB", "bBCCCD", "dDDD.."]),
        ("concat", 2, ["AAAAAB", "bBCCCD"]),
    ],
)
def test_a_drawing_of_each_packer(packer: str, overlap: int, drawing: list[str]) -> None:
    assert Prepared([5, 2, 3, 4], 6, overlap, packer).drawn() == drawing


def test_every_packer_is_a_choice_of_the_configuration_and_has_a_picture() -> None:
    from phased_cpt.config.schema import Data

    assert set(PACKERS) == set(Data.model_fields["packing"].annotation.__args__)  # type: ignore[union-attr]
    assert all("→" in (packer.__doc__ or "") for packer in PACKERS.values())


@pytest.mark.parametrize(("packer", "cuts", "rows"), [("best_fit", 1, 4), ("pad", 3, 4)])
def test_the_toy_of_the_paper(packer: str, cuts: int, rows: int) -> None:
    """T1: lengths 14, 7, 5, 2, 3 in rows of 8: best fit cuts the one document that has to be, concatenation three."""
    prepared = Prepared([14, 7, 5, 2, 3], 8, packer=packer)
    assert (cut_documents(prepared), len(prepared.blocks)) == (cuts, rows)


@pytest.mark.parametrize("capacity", [2048, 8192])
@pytest.mark.parametrize(("median", "sigma"), [(400, 1.0), (250, 1.4)], ids=["text", "code"])
@pytest.mark.parametrize(("documents", "more_rows"), [(2_000, 0.002), (200_000, 0.0005)])
def test_best_fit_cuts_nothing_that_fits_and_costs_no_rows(
    documents: int, more_rows: float, median: int, sigma: float, capacity: int
) -> None:
    """T2: no document that fits is cut, in hardly more rows than concatenation, which cuts (l - 1) / L of them."""
    lengths = np.random.default_rng(0).lognormal(np.log(median), sigma, documents).astype(np.int64).clip(2)
    best, concat = (Prepared(lengths, capacity, packer=packer) for packer in ("best_fit", "pad"))
    fits = lengths <= capacity
    assert cut_documents(best) == (~fits).sum()
    assert len(best.blocks) <= np.ceil(lengths.sum() / capacity) * (1 + more_rows) + 1
    expected = ((lengths[fits] - 1) / capacity).mean()
    assert (cut_documents(concat) - (~fits).sum()) / fits.sum() == pytest.approx(expected, abs=0.01)


def test_best_fit_takes_the_block_with_the_least_room_that_holds_it() -> None:
    """As the textbook does it one by one; the negative control is first fit, which differs."""

    def one_by_one(lengths: list[int], capacity: int, least_room: bool) -> list[int]:
        room: list[int] = []
        for length in sorted(lengths, reverse=True):
            fitting = [at for at, left in enumerate(room) if left >= length]
            if not fitting:
                room.append(capacity)
                fitting = [len(room) - 1]
            at = min(fitting, key=lambda at: room[at]) if least_room else fitting[0]
            room[at] -= length
        return sorted(room)

    differ = 0
    for seed in range(200):
        lengths = np.random.default_rng(seed).integers(1, 20, 40)
        block = best_fit(lengths, 20)
        ours = sorted((20 - np.bincount(block, lengths)).astype(int).tolist())
        assert ours == one_by_one(lengths.tolist(), 20, least_room=True)
        differ += ours != one_by_one(lengths.tolist(), 20, least_room=False)
    assert differ, "the control: first fit gives other rooms"


def test_rows_that_keep_the_order_move_documents_only_within_a_group() -> None:
    """Long documents come first and short ones after them, as in a curriculum; best fit alone would pair them up."""
    lengths = np.repeat([7, 3], 8_000)
    kept, free = (Prepared(lengths, 10, keep_order=keep) for keep in (True, False))

    def widest(prepared: Prepared) -> int:
        """Over how many blocks' worth of the sources a block spreads."""
        start, first = prepared.packed.slices.start, prepared.packed.first
        return int((np.maximum.reduceat(start, first[:-1]) - np.minimum.reduceat(start, first[:-1])).max()) // 10

    assert widest(kept) <= BLOCKS_IN_A_GROUP < 5_000 < widest(free)
    assert (np.diff(kept.packed.slices.start[kept.packed.first[:-1]]) > 0).all(), "blocks in order of their first"


@pytest.mark.parametrize("packer", PACKERS)
def test_no_documents_make_no_blocks(packer: str) -> None:
    assert Prepared([], 8, 2, packer).drawn() == []


def test_the_pictures_in_the_source_are_true() -> None:
    """The drawings of docstrings are what the code does."""
    assert Prepared([5, 2, 3, 4], 6).drawn() == ["AAAAA.", "BBDDDD", "CCC..."]
    assert Prepared([3, 5, 2], 4, 1, "pad").drawn() == ["AAAB", "bBBB", "bBCC"]
    assert Prepared([3, 5, 2], 4, 0, "concat").drawn() == ["AAAB", "BBBB"]
    assert Prepared([8, 2], 6, 0, "none").drawn() == ["AAAAAA", "AA....", "BB...."]
    assert Prepared([12], 6, 2, "none").drawn() == ["AAAAAA", "aaAAAA", "aaAA.."]
    assert (REPOSITORY / "phased_cpt/data/packing.py").read_text().count("→") >= len(PACKERS)
