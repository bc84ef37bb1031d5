"""Which tokens the assistant says: the spans of a chat's text become a mask over its tokens, whose ids stay as ever.

text     <|im_start|>assistant\\nHello!<|im_end|>\\n        the tokens' own bytes, one behind the other, are the text
tokens   [<|im_start|>][assistant][\\n][Hello][!][<|im_end|>][\\n][EOS]
mask          –            –       –     x    x      x        –    –

A token that holds text of a header and of an answer is not said: in use, the header is given and tokenised by itself.
"""

import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Reference
from tokenizers.pre_tokenizers import ByteLevel

from phased_cpt.data.backends import Encoded
from phased_cpt.data.chunks import Integers, Mask
from phased_cpt.data.render import Document
from phased_cpt.data.template import Span
from phased_cpt.data.tokenizer import Tokenizer


def mask_of(documents: Sequence[Document], encoded: Encoded, tokenizer: Tokenizer) -> Mask:
    """Of each id whether the assistant says it."""
    masks = [np.empty(0, bool)]
    ends = np.cumsum(encoded.lengths).tolist()
    for document, begin, end in zip(documents, [0, *ends], ends, strict=False):
        masks.append(_mask(document, encoded.ids[begin:end], tokenizer))
    return np.concatenate(masks)


def with_frame(mask: Mask, is_text: Mask, lengths: Integers) -> Mask:
    """With prefix and EOS, once these are there: the EOS ends a turn that goes on to the end of the text."""
    whole = np.zeros(len(is_text), bool)
    whole[is_text] = mask
    ends = np.cumsum(lengths) - 1
    added = ends[~is_text[ends] & (lengths > 1)]
    whole[added] = whole[added - 1]
    return whole


def _mask(document: Document, ids: NDArray[Any], tokenizer: Tokenizer) -> Mask:
    if not document.said:
        return np.zeros(len(ids), bool)
    text, spans = "".join(part.text for part in document.parts), document.said
    pieces = list(map(_spelling(tokenizer.json).__getitem__, ids.tolist()))
    if b"".join(pieces) == text.encode():
        stops = np.cumsum([len(piece) for piece in pieces])
        starts, spans = np.append(0, stops[:-1]), _in_bytes(text, spans)
    else:  # normalised, or blanks that a special token swallowed
        starts, stops = _places(document, tokenizer)
    if len(starts) != len(ids):
        raise AssertionError(f"the reference gives {len(starts)} tokens for a chat of {len(ids)}: {text[:60]!r}")
    begins, ends = np.array(spans, np.int64).T
    within = np.searchsorted(begins, starts, side="right") - 1
    return np.asarray((within >= 0) & (starts < ends[within]) & (stops <= ends[within]))


def _in_bytes(text: str, spans: tuple[Span, ...]) -> tuple[Span, ...]:
    if text.isascii():
        return spans
    borders = itertools.pairwise([0, *itertools.chain.from_iterable(spans)])
    places = itertools.accumulate(len(text[begin:end].encode()) for begin, end in borders)
    return tuple(map(Span, places, places))


# How a token is written ----------------------------------------------------------------------------------------------


@functools.cache
def _spelling(tokenizer: str) -> list[bytes]:
    """The bytes of each id. Whoever joins them sees whether they are right, so that a guess is enough here."""
    reference = Reference.from_str(tokenizer)
    vocabulary = reference.get_vocab(with_added_tokens=True)
    letters = _letters() if "ByteLevel" in json.dumps(json.loads(tokenizer)["decoder"]) else {"▁": b" "}
    spelled = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        spelled[number] = bytes.fromhex(byte[1]) if byte else b"".join(letters.get(at) or at.encode() for at in token)
    for number, added in reference.get_added_tokens_decoder().items():
        spelled[number] = added.content.encode()
    return spelled


def _letters() -> dict[str, bytes]:
    """Byte-level tokenizers write each byte as a letter: itself where it can be printed, else one beyond Latin-1."""
    alphabet = sorted(ByteLevel.alphabet())
    own = {ord(letter) for letter in alphabet if ord(letter) < 256}
    others = [byte for byte in range(256) if byte not in own]
    return {letter: bytes([byte]) for letter, byte in zip(alphabet, [*sorted(own), *others], strict=True)}


def _places(document: Document, tokenizer: Tokenizer) -> tuple[Integers, Integers]:
    """Where each token begins and ends, by the reference: a hundred times as slow."""
    reference, swallowing = _with_places(tokenizer.json)
    places, at = [], 0
    for text, special in document.parts:
        reference.encode_special_tokens = not special
        encoding = reference.encode(text, add_special_tokens=False)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            words = text[begin:end]  # blanks beside a special token are nobody's
            left, right = (
                (len(words) - len(words.lstrip()), len(words.rstrip())) if token in swallowing else (0, len(words))
            )
            places.append((at + begin + left, at + begin + right))
        at += len(text)
    starts, stops = np.array(places, np.int64).reshape(-1, 2).T
    return starts, stops


@functools.cache
def _with_places(tokenizer: str) -> tuple[Reference, frozenset[int]]:
    """The reference without what comes after it, which cuts blanks off the places; and which tokens swallow blanks."""
    reference = Reference.from_str(json.dumps(json.loads(tokenizer) | {"post_processor": None}))
    added = reference.get_added_tokens_decoder().items()
    return reference, frozenset(number for number, what in added if what.lstrip or what.rstrip)
