"""Documents become windows of at most `capacity` tokens: slices of the token store, never text that is cut.

capacity 6, overlap 2:    t0 t1 t2 t3 t4 t5 t6 t7 t8 t9 t10 EOS
                         [t0 t1 t2 t3 t4 t5]
                                     [t4 t5 t6 t7 t8 t9]            t4 t5 are context: seen, and not trained again
                                                 [t8 t9 t10 EOS]    the window that reaches the end is the last one
"""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Slices:
    """Stretches of token stores, one an entry: documents, windows of them, or what a block is made of."""

    store: Integers  # which token store
    start: Integers  # of its first token there
    length: Integers
    context: Integers  # leading tokens that were trained before, in another slice
    shortened: NDArray[np.bool_]  # the document went on: its last token here is replaced by the EOS

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, which: Integers | NDArray[np.bool_] | slice) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    @classmethod
    def of_documents(cls, store: Integers, start: Integers, length: Integers) -> Self:
        return cls(store, start, length, np.zeros_like(start), np.zeros(len(start), bool))


def shortened(documents: Slices, capacity: int) -> Slices:
    """Only the first `capacity` tokens of each document, the last of them an EOS."""
    length = np.minimum(documents.length, capacity)
    return Slices(documents.store, documents.start, length, documents.context, documents.length > capacity)


def windows(documents: Slices, capacity: int, overlap: int) -> Slices:
    """The windows of every document, in order; one that fits stays whole."""
    step = capacity - overlap
    counts = 1 + -(-np.maximum(documents.length - capacity, 0) // step)
    of = np.repeat(np.arange(len(documents)), counts)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    skipped = nth * step
    return Slices(
        store=documents.store[of],
        start=documents.start[of] + skipped,
        length=np.minimum(documents.length[of] - skipped, capacity),
        context=np.where(nth > 0, overlap, 0),
        shortened=documents.shortened[of],
    )


def counted(mask: Mask, start: Integers, length: Integers) -> Integers:
    """How much of each stretch is set; in the order of the store, so that what lies between them is read once."""
    counts = np.zeros(len(start), np.int64)
    real = np.flatnonzero(length > 0)  # of an empty stretch, reduceat gives what stands there
    real = real[np.argsort(start[real], kind="stable")]
    if len(real):
        edges = np.stack([start, start + length], axis=1)[real].ravel()
        begin, end = edges[0], edges.max()
        counts[real] = np.add.reduceat(np.append(mask[begin:end], False), edges - begin, dtype=np.int64)[::2]
    return counts
