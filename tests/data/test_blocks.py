"""Blocks by index."""

import numpy as np
import pytest

from phased_cpt.data.blocks import IGNORED, Blocks, Shape
from phased_cpt.data.chunks import Slices
from tests.data.shapes import EOS, PAD, Prepared


def test_a_row_as_it_is_drawn_in_the_source() -> None:
    case = Prepared([5, 9], 8, 1)
    assert case.drawn() == ["AAAAAbB.", "BBBBBBBB"]
    row = case.rows[0]
    assert row["input_ids"].tolist() == [10, 11, 12, 13, EOS, 22, EOS, PAD]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 0]
    assert row["labels"].tolist() == [IGNORED, 11, 12, 13, EOS, IGNORED, EOS, IGNORED]
    assert "attention_mask" not in row


def test_a_block_may_hold_documents_of_several_stores() -> None:
    stores = [np.arange(10, 20, dtype=np.uint16), np.arange(70_000, 70_010, dtype=np.uint32)]
    slices = Slices.of_documents(np.array([1, 0, 1]), np.array([2, 5, 0]), np.array([2, 3, 1]))
    blocks = Blocks(stores, slices, np.array([0, 3]), Shape(7, EOS, PAD))
    assert blocks[0]["input_ids"].tolist() == [70_002, 70_003, 15, 16, 17, 70_000, PAD]


def test_the_end_of_a_document_has_a_label_also_where_it_pads() -> None:
    """EOS = PAD is common; collators that mask by id never teach a model to stop."""
    case = Prepared([3, 4], 10)
    blocks = Blocks([case.tokens], case.packed.slices, case.packed.first, Shape(10, EOS, pad_id=EOS))
    row = blocks[0]
    assert (row["labels"] == EOS).sum() == 2
    assert (row["input_ids"] == EOS).sum() == 2 + 3, "the control: padding is the same id"


def test_an_index_beyond_the_end_is_no_block() -> None:
    blocks = Prepared([5, 5, 5], 5).blocks
    assert blocks[-1]["input_ids"].tolist() == blocks[2]["input_ids"].tolist()
    for at in (3, -4):
        with pytest.raises(IndexError, match="there are 3"):
            blocks[at]
