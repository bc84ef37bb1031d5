"""How many bytes of text a held-out set is, so that its loss can be told in bits per byte, whatever the tokenizer.

ids of a document ─ without its EOS ─ what the assistant says, if that alone is measured ─ decoded ─ UTF-8
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from phased_cpt.data.cache import remember, remembered
from phased_cpt.data.index import Share
from phased_cpt.data.prepared import PreparedSplit
from phased_cpt.data.tokenizer import Tokenizer

AT_ONCE = 1024  # documents that are decoded together


def text_bytes(split: PreparedSplit, tokenizer: Tokenizer, cache: Path) -> int:
    """Of its documents, each once, without special tokens; remembered by the index, whose name is made of all that."""
    memory = cache / "bytes" / f"{split.index.folder.name}.json"
    known = remembered(memory).get("bytes")
    if type(known) is int:
        return known
    # What chunk_long_samples: false cuts off is not measured; an EOS stands for the last token that is left.
    longest = split.index.blocks.shape.max_tokens - 1 if split.index.account.documents_shortened else None
    count = sum(_bytes(texts, tokenizer) for share in split.shares for texts in _texts(share, longest, tokenizer))
    remember(memory, {"bytes": count})
    return count


def _bytes(texts: list[list[int]], tokenizer: Tokenizer) -> int:
    return sum(len(text.encode()) for text in tokenizer.reference.decode_batch(texts, skip_special_tokens=True))


def _texts(share: Share, longest: int | None, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """The ids of each document that are measured, some documents at a time; of a chat each turn by itself."""
    ids, said, offsets = share.store.ids, share.store.said, share.store.offsets
    for first in range(0, len(share.documents), AT_ONCE):
        texts = []
        for document in share.documents[first : first + AT_ONCE].tolist():
            begin, end = int(offsets[document]), int(offsets[document + 1])
            end -= int(ids[end - 1] == tokenizer.eos_id)
            end = end if longest is None else min(end, begin + longest)
            measured = np.ones(end - begin, bool) if said is None else said[begin:end]
            borders = np.flatnonzero(np.diff(measured, prepend=False, append=False)) + begin
            texts += [ids[start:stop].tolist() for start, stop in zip(borders[::2], borders[1::2], strict=True)]
        yield texts
