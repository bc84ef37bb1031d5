"""Where every token went. Two identities hold for any packer, and are asserted each time:

tokens_source + tokens_repeated = tokens_trained + tokens_masked + tokens_first + tokens_dropped
positions = blocks × max_tokens = tokens_source − tokens_dropped + tokens_context + tokens_padded
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phased_cpt.data.blocks import Shape
from phased_cpt.data.chunks import Integers, Mask, Slices, counted
from phased_cpt.data.packing import Packed


@dataclass(frozen=True)
class Account:
    """The figures of one split of one phase."""

    documents: int  # as often as they are seen in an epoch
    chunks: int  # slices of them, in all blocks
    blocks: int
    tokens_source: int
    tokens_trained: int  # labels
    tokens_first: int  # first of a document, or after a cut without overlap: nothing to predict them from
    tokens_context: int  # seen again, to give context
    tokens_repeated: int  # of these, trained again (overlap_loss: count)
    tokens_padded: int
    tokens_dropped: int
    documents_shortened: int  # by chunk_long_samples: false
    tokens_masked: int = 0  # not what the assistant says, where that alone is trained

    @property
    def efficiency(self) -> float:
        """Share of the positions that hold a token."""
        positions = self.tokens_source - self.tokens_dropped + self.tokens_context + self.tokens_padded
        return 1 - self.tokens_padded / positions if positions else 0.0


def account_of(source: Slices, seen: Slices, packed: Packed, shape: Shape, said: Sequence[Mask | None] = ()) -> Account:
    """Count what was packed of the documents, each figure by itself, and prove that they agree.

    `source` are the documents as they are, `seen` what chunk_long_samples has left of them, `said` of each store which
    tokens the assistant says.
    """
    slices, blocks = packed.slices, len(packed.first) - 1
    unlabelled = _unlabelled(slices, shape.train_context)
    trained = labels_of(slices, shape.train_context, said)
    account = Account(
        documents=len(source),
        chunks=len(slices),
        blocks=blocks,
        tokens_source=int(source.length.sum()),
        tokens_trained=int(trained.sum()),
        tokens_first=int((slices.context == 0).sum()),
        tokens_context=int(slices.context.sum()),
        tokens_repeated=int(np.maximum(slices.context - 1, 0).sum()) if shape.train_context else 0,
        tokens_padded=blocks * shape.max_tokens - int(slices.length.sum()),
        tokens_dropped=packed.dropped + int((source.length - seen.length).sum()),
        documents_shortened=int(seen.shortened.sum()),
        tokens_masked=int((slices.length - unlabelled - trained).sum()),
    )
    _prove(account, packed, shape.max_tokens)
    return account


def _unlabelled(slices: Slices, train_context: bool) -> Integers:
    return np.maximum(0 if train_context else slices.context, 1)


def labels_of(slices: Slices, train_context: bool = False, said: Sequence[Mask | None] = ()) -> Integers:
    """Labels of each slice: all behind the unlabelled, or what the assistant says of them."""
    unlabelled = _unlabelled(slices, train_context)
    begins, lengths = slices.start + unlabelled, slices.length - unlabelled
    trained = lengths.copy()
    for store, mask in enumerate(said):
        if mask is not None:
            here = slices.store == store
            trained[here] = counted(mask, begins[here], lengths[here])
    return trained


def _prove(account: Account, packed: Packed, max_tokens: int) -> None:
    tokens = account.tokens_source - account.tokens_dropped
    if tokens + account.tokens_repeated != account.tokens_trained + account.tokens_masked + account.tokens_first:
        raise AssertionError(f"tokens are lost or made up: {account}")
    if tokens + account.tokens_context + account.tokens_padded != account.blocks * max_tokens:
        raise AssertionError(f"positions are lost or made up: {account}")
    if account.blocks and np.add.reduceat(packed.slices.length, packed.first[:-1]).max() > max_tokens:
        raise AssertionError(f"a block holds more than {max_tokens} tokens")
