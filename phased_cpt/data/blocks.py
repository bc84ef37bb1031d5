"""Blocks: fixed-length rows, each made on demand from slices of the memory-mapped token stores.

slices of block 7   [d12: 5 tokens] [d40: 3 tokens, 1 of them context]      max_tokens 10
input_ids            a  b  c  d  E   w  x  E   .  .
position_ids         0  1  2  3  4   0  1  2   0  1      restart at every document, so that attention keeps them apart
labels               –  b  c  d  E   –  x  E   –  –      – is -100: nothing to predict it from, context, or padding
                                                         (or, if only what the assistant says is trained, all else)
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.chunks import Integers, Mask, Slices

IGNORED = -100


class Row(TypedDict):
    """What a model is trained on, called with use_cache=False.

    There is no attention_mask: one of ones, like a cache, silently lets the documents of a row see each other.
    """

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
    said: Sequence[Mask | None] = ()  # of each store, where only what the assistant says is trained

    def __len__(self) -> int:
        return len(self.first) - 1

    def first_rows(self, count: int) -> "Blocks":
        """The first blocks alone."""
        return replace(self, first=self.first[: count + 1])

    def slices_of(self, block: int) -> Slices:
        """What a block is made of."""
        return self.slices[self._where(block)]

    def _where(self, block: int) -> slice:
        at = block + len(self) if block < 0 else block
        if not 0 <= at < len(self):
            raise IndexError(f"there is no block {block}: there are {len(self)}")
        return slice(int(self.first[at]), int(self.first[at + 1]))

    def __getitem__(self, block: int) -> Row:
        """Whole arrays at a time: a loop over slices costs several times as much where documents are short."""
        where, shape = self._where(block), self.shape
        length, context = self.slices.length[where], self.slices.context[where]
        ends = length.cumsum()
        begins = ends - length
        used = int(ends[-1])
        places = _places(shape.max_tokens)
        positions, ids = np.empty(shape.max_tokens, np.int64), np.empty(shape.max_tokens, np.int64)
        np.subtract(places[:used], begins.repeat(length), out=positions[:used])
        positions[used:] = places[: shape.max_tokens - used]  # padding is a document of its own
        ids[:used] = self._tokens(where, positions[:used])
        ids[used:] = shape.pad_id
        ids[ends[self.slices.shortened[where]] - 1] = shape.eos_id
        labels = ids.copy()
        labels[used:] = IGNORED
        if any(mask is not None for mask in self.said):
            labels[:used][~self._said(where, positions[:used])] = IGNORED
        labels[begins] = IGNORED
        if not shape.train_context:
            for at in context.nonzero()[0].tolist():
                labels[begins[at] : begins[at] + context[at]] = IGNORED
        return Row(input_ids=ids, position_ids=positions, labels=labels)

    def _said(self, where: slice, positions: Integers) -> Mask:
        """Of the tokens at their places; a store that does not say who speaks is trained whole."""
        length = self.slices.length[where]
        at, of = positions + self.slices.start[where].repeat(length), self.slices.store[where].repeat(length)
        said = np.ones(len(at), bool)
        for each in np.unique(of).tolist():
            if (mask := self.said[each]) is not None:
                here = of == each
                said[here] = mask.take(at[here])
        return said

    def _tokens(self, where: slice, positions: Integers) -> NDArray[Any]:
        """The tokens at their places, out of one store or of several."""
        store, length = self.slices.store[where], self.slices.length[where]
        at = positions + self.slices.start[where].repeat(length)
        one = int(store[0])
        if len(self.stores) == 1 or (store == one).all():
            return self.stores[one].take(at)
        of = store.repeat(length)
        tokens = np.empty(len(at), np.int64)
        for each in np.unique(store):
            tokens[of == each] = self.stores[int(each)].take(at[of == each])
        return tokens


@functools.cache
def _places(count: int) -> Integers:
    """0, 1, 2, …: shared, so nobody may write into it."""
    places = np.arange(count)
    places.setflags(write=False)
    return places
