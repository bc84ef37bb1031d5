"""Blocks: fixed-length rows, each made on demand from slices of the memory-mapped token stores.

slices of block 7   [d12: 5 tokens] [d40: 3 tokens, 1 of them context]      max_tokens 10
input_ids            a  b  c  d  E   w  x  E   .  .
position_ids         0  1  2  3  4   0  1  2   0  1      restart at every document, so that attention keeps them apart
labels               –  b  c  d  E   –  x  E   –  –      – is -100: nothing to predict it from, context, or padding
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.chunks import Integers, Slices

IGNORED = -100


class Row(TypedDict):
    """What a model is trained on. There is no attention_mask: one of ones would undo the isolation of the documents."""

    input_ids: Integers
    position_ids: Integers
    labels: Integers


@dataclass(frozen=True)
class Shape:
    """What a row looks like, whatever is in it."""

    max_tokens: int
    eos_id: int
    pad_id: int
    train_context: bool = False  # overlap_loss: count


@dataclass(frozen=True)
class Blocks:
    """The blocks of a split by index. A block costs the same to find wherever it lies, and however large the store."""

    stores: Sequence[NDArray[Any]]  # the ids of each token store
    slices: Slices
    first: Integers  # of each block, the index of its first slice; and the end
    shape: Shape

    def __len__(self) -> int:
        return len(self.first) - 1

    def slices_of(self, block: int) -> Slices:
        """What a block is made of."""
        at = block + len(self) if block < 0 else block
        if not 0 <= at < len(self):
            raise IndexError(f"there is no block {block}: there are {len(self)}")
        return self.slices[slice(int(self.first[at]), int(self.first[at + 1]))]

    def __getitem__(self, block: int) -> Row:
        """Whole arrays at a time: a loop over slices would cost 50 ns a token where documents are short."""
        pieces, shape = self.slices_of(block), self.shape
        ends = pieces.length.cumsum()
        begins = ends - pieces.length
        used = int(ends[-1])
        places = np.arange(shape.max_tokens)
        positions = places - used  # padding is a document of its own
        np.subtract(places[:used], begins.repeat(pieces.length), out=positions[:used])
        ids = np.full(shape.max_tokens, shape.pad_id)
        ids[:used] = self._tokens(pieces, positions[:used])
        ids[(ends - 1)[pieces.shortened]] = shape.eos_id
        labels = ids.copy()
        labels[used:] = IGNORED
        labels[begins] = IGNORED
        if not shape.train_context:
            for at in np.flatnonzero(pieces.context):
                labels[begins[at] : begins[at] + pieces.context[at]] = IGNORED
        return Row(input_ids=ids, position_ids=positions, labels=labels)

    def _tokens(self, pieces: Slices, positions: Integers) -> NDArray[Any]:
        """The tokens at their places, out of one store or of several."""
        where = positions + pieces.start.repeat(pieces.length)
        one = int(pieces.store[0])
        if len(self.stores) == 1 or (pieces.store == one).all():
            return self.stores[one].take(where)
        of = pieces.store.repeat(pieces.length)
        tokens = np.empty(len(where), np.int64)
        for store in np.unique(pieces.store):
            tokens[of == store] = self.stores[int(store)].take(where[of == store])
        return tokens
