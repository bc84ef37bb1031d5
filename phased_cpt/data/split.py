"""Which documents are held out: by a hash of their text, so that copies fall on one side, whatever a run changes.

0 ─────────── share ──────────────────────────────── 1     each document has its place here
 held out           trained
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.chunks import Integers
from phased_cpt.data.mixing import Scores, mixed, seed_of
from phased_cpt.run_dir import publish_file


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
    chosen = (places < int(share * 2**64)) & (np.cumsum(tokens) <= max_tokens)
    taken: list[int] = []
    chosen[of[np.isin(digests, np.array(always, np.uint64))]] = True
    if not chosen.any() and len(places) > 1:
        first = int(np.flatnonzero(tokens <= np.median(tokens))[0])  # no giant: it may be most of the source
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
        return list(self._all().get(self._seed, []))

    def add(self, digests: list[int]) -> None:
        if digests:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            publish_file(self._file, json.dumps(self._all() | {self._seed: digests}).encode(), shared=True)

    def _all(self) -> dict[str, list[int]]:
        try:
            return dict(json.loads(self._file.read_bytes()))
        except (OSError, ValueError):
            return {}


# Copies --------------------------------------------------------------------------------------------------------------


def copies(digests: Scores) -> int:
    """How many documents are an exact copy of another one before them."""
    return len(digests) - len(np.unique(digests))


def shared(digests: Scores, others: Scores) -> int:
    """How many documents are among the others, too."""
    return int(np.isin(digests, others).sum())
