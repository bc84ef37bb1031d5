"""Which documents are held out: by a hash of their text, so that copies fall on one side, whatever a run changes.

0 ─────────── share ──────────────────────────────── 1     each document has its place here
 held out           trained
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.cache import remember, remembered
from phased_cpt.data.chunks import Integers
from phased_cpt.data.mixing import Scores, mixed, seed_of


def held_out(
    digests: Scores, lengths: Integers, share: float, seed: int, max_tokens: int, always: list[int]
) -> tuple[NDArray[np.bool_], list[int]]:
    """Which documents are held out, and the digest of one that was taken because there would be none.

    Whatever the share, one document is held out if there are two, and one is left to train on.
    """
    if not share or not len(digests):
        return np.zeros(len(digests), bool), []
    places, of = np.unique(mixed(digests, seed_of("held out", seed)), return_inverse=True)
    tokens = np.bincount(of, lengths)
    fits = tokens <= max_tokens  # one that never fits does not stand in the way of the others
    chosen = fits & (places < int(share * 2**64)) & (np.cumsum(np.where(fits, tokens, 0)) <= max_tokens)
    taken: list[int] = []
    chosen[of[np.isin(digests, np.array(always, np.uint64))]] = True
    if not chosen.any() and len(places) > 1:
        # The first that is no giant: a giant may be most of the source.
        first = int(np.argmax(tokens <= min(max_tokens, np.median(tokens)))) if fits.any() else int(np.argmin(tokens))
        chosen[first] = True
        taken = [int(digests[of == first][0])]
    if chosen.all():
        chosen[-1] = False
    return chosen[of], taken


# Documents that were taken to have any ------------------------------------------------------------------------------


class Taken:
    """What was held out only because there would have been nothing: remembered, so that growth does not move it."""

    def __init__(self, file: Path, seed: int) -> None:
        self._file, self._seed = file, str(seed)

    def read(self) -> list[int]:
        digests = remembered(self._file).get(self._seed)
        whole = isinstance(digests, list) and all(isinstance(each, int) and 0 <= each < 2**64 for each in digests)
        return list(digests or []) if whole else []

    def add(self, digests: list[int]) -> None:
        if digests:
            remember(self._file, remembered(self._file) | {self._seed: digests})


# Copies --------------------------------------------------------------------------------------------------------------


def kinship(sides: Sequence[Scores]) -> NDArray[np.int64]:
    """How many documents of one side are on another, too; on the diagonal, how many are copies of one before them.

    Sorted once, whatever the number of sides: sides of a million documents are no rarity, and pairs are many.
    """
    distinct, of = np.unique(np.concatenate([*sides, np.empty(0, np.uint64)]), return_inverse=True)
    each = np.split(of, np.cumsum([len(side) for side in sides])[:-1])
    counts = np.zeros((len(sides), len(sides)), np.int64)
    for one, documents in enumerate(each):
        there = np.zeros(len(distinct), bool)
        there[documents] = True
        counts[:, one] = [there[others].sum() for others in each]
        counts[one, one] = len(documents) - there.sum()
    return counts
