"""Draws that depend on their seeds and on nothing else: what a weight takes of a source, and the order of the rows.

A hash of (seed, index) is ordered, not a generator's stream: numpy may change its streams between releases, and the
same run must read the same rows after an upgrade.
"""

import hashlib
import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Scores = NDArray[np.uint64]


def seed_of(*words: str | int) -> int:
    """64 bits out of any words."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little")


def mixed(values: Scores, seed: int) -> Scores:
    """splitmix64 over whole arrays: neighbouring values get unrelated scores."""
    state = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def shuffled(count: int, *seed: str | int) -> Indices:
    """0 … count-1 in an order of their own."""
    return np.argsort(mixed(np.arange(count, dtype=np.uint64), seed_of(*seed)), kind="stable")


def drawn(count: int, weight: float, *seed: str | int) -> Indices:
    """The documents of an epoch, as often as their source weighs, each pass in the source's order.

    5 documents × 2.4 →  0 1 2 3 4 | 0 1 2 3 4 | and two of them, by the seed
    """
    whole, rest = divmod(Fraction(repr(weight)), 1)
    extra = math.floor(rest * count + Fraction(1, 2))
    if not whole and count:
        extra = max(extra, 1)  # a small weight thins a source out; it does not take it away
    passes = [np.arange(count)] * int(whole)
    return np.concatenate([*passes, np.sort(shuffled(count, *seed)[:extra])]).astype(np.int64)


def row_order(rows: int, epochs: float, *seed: str | int, shuffle: bool = True) -> Indices:
    """Which row is trained when: one permutation after the other; the last one is cut where the budget ends."""
    total = math.ceil(Fraction(repr(epochs)) * rows)
    passes = -(-total // rows) if rows else 0
    each = [shuffled(rows, *seed, epoch) if shuffle else np.arange(rows) for epoch in range(passes)]
    return np.concatenate([*each, np.empty(0, np.int64)]).astype(np.int64)[:total]


def training_order(blocks: int, places: int, rows: int | None, *seed: str | int, shuffle: bool = True) -> Indices:
    """Which block is trained in each place, epoch after epoch; -1 where a place stays empty.

    `rows` is where the budget ends, if that may be within a batch: what is left of it is filled up with empty rows, not
    with those of another epoch.
    """
    rows = places if rows is None else rows
    order = row_order(blocks, -(-rows // blocks), *seed, shuffle=shuffle)[:rows]
    return np.concatenate([order, np.full(places - len(order), -1)]).astype(np.int64)
