"""How slices fill blocks of exactly `capacity` tokens. To add a way, write it below another and name it in PACKERS.

A packer gets documents in order and gives the slices of the blocks in order, with the index of each block's first one.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from phased_cpt.data.chunks import Integers, Slices, windows

# Rows that keep the order of the sources are packed so many at a time: documents move within a group, never further.
BLOCKS_IN_A_GROUP = 256


class Packed(NamedTuple):
    """Blocks: block n holds the slices first[n] … first[n + 1] - 1."""

    slices: Slices
    first: Integers
    dropped: int = 0  # tokens that are in no block


Packer = Callable[[Slices, int, int, bool], Packed]


def pack_best_fit(documents: Slices, capacity: int, overlap: int, keep_order: bool) -> Packed:
    """Nothing that fits a block is cut; each slice goes where it leaves the least room.

    A A A A A | B B | C C C | D D D D     capacity 6 →  [A A A A A .] [D D D D B B] [C C C . . .]
    """
    slices = windows(documents, capacity, overlap)
    block = np.empty(len(slices), np.int64)
    groups = np.zeros(len(slices), np.int64)
    if keep_order:
        groups = (np.cumsum(slices.length) - slices.length) // (BLOCKS_IN_A_GROUP * capacity)
    edges = [*np.flatnonzero(np.diff(groups, prepend=-1)), len(slices)]
    blocks = 0
    for begin, end in itertools.pairwise(edges):
        block[begin:end] = blocks + best_fit(slices.length[begin:end], capacity)
        blocks = int(block[begin:end].max()) + 1
    return _in_blocks(slices, block)


def best_fit(lengths: Integers, capacity: int) -> Integers:
    """The block of each length: longest first, each into the block with the least room that holds it.

    Equal lengths go together, and so do blocks with equal room: linear, and 10 million lengths take seconds.
    """
    block = np.empty(len(lengths), np.int64)  # by rank: the longest first
    shelves: dict[int, list[range]] = {}  # room → the blocks that have it
    rooms = 0  # the same as bits, so that the least room that fits is one bit operation away
    opened = rank = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for length, count in _runs(lengths[longest_first]):
        left = count
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
            else:
                room = capacity
                more = -(-left // (capacity // length))
                shelves.setdefault(room, []).append(range(opened, opened + more))
                rooms |= 1 << room
                opened += more
            taken = shelves[room].pop()
            each = min(room // length, left)
            full = min(len(taken), left // each)
            block[rank : rank + full * each] = np.repeat(np.arange(taken.start, taken.start + full), each)
            rank, left = rank + full * each, left - full * each
            if taken[full:]:
                shelves[room].append(taken[full:])
            if not shelves[room]:
                rooms &= ~(1 << room)
            shelves.setdefault(room - each * length, []).append(taken[:full])
            rooms |= 1 << (room - each * length)
    of_item = np.empty(len(lengths), np.int64)
    of_item[longest_first] = block
    return of_item


def _runs(descending: Integers) -> list[tuple[int, int]]:
    """(length, how many), without a gap."""
    edges = np.flatnonzero(np.diff(descending, prepend=-1))
    counts = np.diff(edges, append=len(descending))
    return list(zip(descending[edges].tolist(), counts.tolist(), strict=True))


def pack_none(documents: Slices, capacity: int, overlap: int, keep_order: bool) -> Packed:
    """A block for every window.

    A A A A A A A A | B B      capacity 6 →  [A A A A A A] [A A . . . .] [B B . . . .]
    """
    slices = windows(documents, capacity, overlap)
    return Packed(slices, np.arange(len(slices) + 1))


def pack_pad(documents: Slices, capacity: int, overlap: int, keep_order: bool) -> Packed:
    """One stream, cut wherever a block is full; the last one is filled up.

    A A A | B B B B B | C C     capacity 4, overlap 0 →  [A A A B] [B B B B] [C C . .]
                                capacity 4, overlap 1 →  [A A A B] [b B B B] [b B C C]     b: context
    """
    ends = np.cumsum(documents.length)
    starts = ends - documents.length
    borders = _borders(starts, int(ends[-1]) if len(ends) else 0, capacity, overlap)
    # A slice begins where a document or a block does.
    begins = np.union1d(starts, borders[:-1])
    of = np.searchsorted(starts, begins, side="right") - 1
    into = begins - starts[of]
    at_border = np.isin(begins, borders, assume_unique=True)
    context = np.where(at_border, np.minimum(into, overlap), 0)
    length = np.diff(begins, append=borders[-1:])
    slices = Slices(
        store=documents.store[of],
        start=documents.start[of] + into - context,
        length=length + context,
        context=context,
        shortened=documents.shortened[of] & (into + length == documents.length[of]),
    )
    return Packed(slices, np.append(np.searchsorted(begins, borders[:-1]), len(slices)))


def pack_concat(documents: Slices, capacity: int, overlap: int, keep_order: bool) -> Packed:
    """The same, but what is left after the last full block is dropped, and counted.

    A A A | B B B B B | C C     capacity 4 →  [A A A B] [B B B B]     C C dropped
    """
    slices, first, _ = pack_pad(documents, capacity, overlap, keep_order)
    if len(first) == 1 or slices.length[first[-2] :].sum() == capacity:
        return Packed(slices, first)
    rest = slices[slice(first[-2], None)]
    return Packed(slices[slice(first[-2])], first[:-1], dropped=int((rest.length - rest.context).sum()))


def _borders(starts: Integers, total: int, capacity: int, overlap: int) -> Integers:
    """Where in the stream each block begins, and where the last one ends; a block that cuts a document re-reads it."""
    if not overlap:
        return np.append(np.arange(0, total, capacity), total)
    ends = np.append(starts[1:], total)
    borders, at = [], 0
    while at < total:
        of = int(np.searchsorted(starts, at, side="right")) - 1
        into = at - int(starts[of])
        step = capacity - min(into, overlap)
        # Further into a document than the overlap, the step is the same until its end: all of these borders at once.
        count = -(-(int(ends[of]) - at) // step) if into >= overlap else 1
        borders.append(np.arange(at, at + count * step, step))
        at += count * step
    return np.concatenate([*borders, np.array([total])])


def _in_blocks(slices: Slices, block: Integers) -> Packed:
    """The slices block by block; the blocks in the order of their first slices, and these in their own."""
    count = int(block.max()) + 1 if len(block) else 0
    earliest = np.full(count, len(block))
    np.minimum.at(earliest, block, np.arange(len(block)))
    place = np.empty(count, np.int64)
    place[np.argsort(earliest)] = np.arange(count)
    order = np.argsort(place[block], kind="stable")
    first = np.append(0, np.cumsum(np.bincount(place[block], minlength=count)))
    return Packed(slices[order], first.astype(np.int64))


PACKERS: dict[str, Packer] = {
    "best_fit": pack_best_fit,
    "concat": pack_concat,
    "pad": pack_pad,
    "none": pack_none,
}
