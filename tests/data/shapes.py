"""What the tests of this room share: documents as plain numbers, packed by any packer, and their rows."""

from collections.abc import Sequence

import numpy as np

from phased_cpt.data.account import Account, account_of
from phased_cpt.data.blocks import Blocks, Row, Shape
from phased_cpt.data.chunks import Slices, shortened
from phased_cpt.data.packing import PACKERS

EOS, PAD = 1, 2


class Prepared:
    """Documents of given lengths, whose tokens all differ, packed and counted."""

    def __init__(
        self,
        lengths: Sequence[int],
        capacity: int,
        overlap: int = 0,
        packer: str = "best_fit",
        *,
        chunk_long: bool = True,
        train_context: bool = False,
        keep_order: bool = False,
    ) -> None:
        each = np.array(lengths, np.int64)
        self.tokens = np.arange(10, 10 + each.sum())
        self.tokens[np.cumsum(each) - 1] = EOS
        documents = Slices.of_documents(np.zeros(len(each), np.int64), np.cumsum(each) - each, each)
        seen = documents if chunk_long else shortened(documents, capacity)
        self.packed = PACKERS[packer](seen, capacity, overlap, keep_order)
        self.shape = Shape(capacity, EOS, PAD, train_context)
        self.blocks = Blocks([self.tokens], self.packed.slices, self.packed.first, self.shape)
        self.account: Account = account_of(documents, seen, self.packed, self.shape)

    @property
    def rows(self) -> list[Row]:
        return [self.blocks[at] for at in range(len(self.blocks))]

    def drawn(self) -> list[str]:
        """Each block as letters, a letter a document: capitals are trained or first, small ones context, . padding."""
        return [self._block(at) for at in range(len(self.blocks))]

    def _block(self, at: int) -> str:
        ends = np.flatnonzero(self.tokens == EOS) + 1
        drawing = ""
        for start, length, context in zip(*self._columns(at), strict=True):
            letter = chr(ord("A") + int(np.searchsorted(ends, start, side="right")))
            drawing += letter.lower() * int(context) + letter * int(length - context)
        return drawing.ljust(self.shape.max_tokens, ".")

    def _columns(self, at: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        pieces = self.blocks.slices_of(at)
        return pieces.start, pieces.length, pieces.context
