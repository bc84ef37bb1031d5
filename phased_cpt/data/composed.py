"""The rows of a whole phase out of several parts, in the order in which they are trained; each part to the token.

part         rows of one pass, each pass in an order of its own     as many tokens as are its share
own 0.9      [o3] [o1] [o2] · [o2] [o3] [o1] · [o1] …          →   [o3] [o1] [o2] [o2] [o3] [o1] [o1]
old 0.1      [f5] [f2] …                                       →   [f5] [f]                       f: f2, cut short
spread evenly                                                  →   [o3] [f5] [o1] [o2] [o2] [o3] [f] [o1] [o1]
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.account import Account, account_of, labels_of
from phased_cpt.data.blocks import Blocks
from phased_cpt.data.cache import Facts, Tell, key_of, make_once, sealed_facts
from phased_cpt.data.chunks import Integers, Mask, Slices
from phased_cpt.data.index import BlockIndex, Share, saved
from phased_cpt.data.mixing import shuffled
from phased_cpt.data.packing import Packed


@dataclass(frozen=True)
class Part:
    """Documents that a phase is trained on, and their share of its tokens."""

    phase: str  # whose they are
    sources: tuple[Share, ...]
    index: BlockIndex  # of one pass over them
    rows: "Passes"
    share: float = 1.0
    weight: float = 1.0  # passes over it in an epoch, where that is not what the share says

    @property
    def key(self) -> list[object]:
        return [self.index.folder.name, self.rows.seed if self.rows.shuffle else None]


class Passes:
    """The rows of a part, pass after pass, for ever; those that train nothing are left out."""

    def __init__(self, blocks: Blocks, seed: tuple[str | int, ...], shuffle: bool) -> None:
        self.blocks, self.seed, self.shuffle = blocks, seed, shuffle
        of_slices = labels_of(blocks.slices, blocks.shape.train_context, blocks.said)
        self._labels = np.add.reduceat(of_slices, blocks.first[:-1]) if len(blocks) else np.empty(0, np.int64)
        self._count = int((self._labels > 0).sum())
        self.tokens = int(self._labels.sum())  # trained, in one pass
        self._known: dict[int, tuple[Integers, Integers]] = {}

    def _pass(self, number: int) -> tuple[Integers, Integers]:
        """The rows of a pass in their order, and the tokens that are trained up to the end of each."""
        if number not in self._known:
            order = shuffled(len(self.blocks), *self.seed, number) if self.shuffle else np.arange(len(self.blocks))
            order = order[self._labels[order] > 0]
            self._known[number] = order, np.cumsum(self._labels[order])
        return self._known[number]

    def count(self, tokens: int) -> int:
        """How many rows hold so many tokens."""
        passes, rest = divmod(tokens, self.tokens)
        return passes * self._count + (int(np.searchsorted(self._pass(passes)[1], rest)) + 1 if rest else 0)

    def most(self, rows: int) -> int:
        """More tokens than any so many rows hold."""
        return rows * int(self._labels.max()) + 1

    def taken(self, tokens: int) -> tuple[Slices, Integers]:
        """The first rows that hold so many tokens; the last of them is cut there."""
        passes, rest = divmod(tokens, self.tokens)
        which = [self._pass(number)[0] for number in range(passes)]
        if rest:
            order, sums = self._pass(passes)
            which.append(order[: np.searchsorted(sums, rest) + 1])
        slices, first = rows_of(self.blocks, np.concatenate([np.empty(0, np.int64), *which]))
        over = (int(sums[len(which[-1]) - 1]) - rest) if rest else 0
        return _shortened(slices, first, over, self.blocks) if over else (slices, first)


def rows_of(blocks: Blocks, which: Integers) -> tuple[Slices, Integers]:
    """The slices of these rows, one row behind the other, and where each begins."""
    counts = np.diff(blocks.first)[which]
    first = np.append(0, np.cumsum(counts))
    at = np.arange(first[-1]) - np.repeat(first[:-1], counts) + np.repeat(blocks.first[which], counts)
    return blocks.slices[at], first


def _shortened(slices: Slices, first: Integers, over: int, blocks: Blocks) -> tuple[Slices, Integers]:
    """The same rows with so many labels less in the last one: the cut is no end, so no EOS is put there."""
    labels = labels_of(slices[slice(first[-2], None)], blocks.shape.train_context, blocks.said)
    sums = np.cumsum(labels)
    within = int(np.searchsorted(sums, sums[-1] - over))
    last = int(first[-2]) + within
    wanted = int(labels[within] - (sums[within] - (sums[-1] - over)))
    longest = int(slices.length[last])
    tried = slices[np.full(longest, last)]
    lengths = np.arange(1, longest + 1)
    length = int(lengths[np.searchsorted(_labels_at(tried, lengths, blocks), wanted)])
    kept = slices[slice(last + 1)]
    cut = replace(
        kept,
        length=np.append(kept.length[:-1], length),
        shortened=np.append(kept.shortened[:-1], kept.shortened[-1] & (length == longest)),
    )
    return cut, np.append(first[:-1], last + 1)


def _labels_at(tried: Slices, lengths: Integers, blocks: Blocks) -> Integers:
    """Labels of one slice, were it so long: never more with less."""
    return np.maximum(labels_of(replace(tried, length=lengths), blocks.shape.train_context, blocks.said), 0)


# How many tokens of each part ---------------------------------------------------------------------------------------


def tokens_in_all(parts: Sequence[Part], total: int) -> list[int]:
    """So many tokens shared out; what rounding leaves is the largest part's."""
    tokens = [round(Fraction(part.share) * total) for part in parts]
    lead = _largest(parts)
    tokens[lead] += total - sum(tokens)
    return tokens


def tokens_in_rows(parts: Sequence[Part], rows: int) -> list[int]:
    """As many tokens as fill exactly so many rows, shared out; each part has rows of its own."""
    lead = _largest(parts)
    few, many = 0, parts[lead].rows.most(rows)  # of the largest part: what fits, and what does not
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if sum(_counts(parts, _beside(parts, lead, middle))) <= rows else (few, middle)
    tokens = _beside(parts, lead, few)
    room = rows - sum(_counts(parts, tokens))
    # With one token more several parts may begin a row at once: as many of them as there is room for.
    for at, more in enumerate(_beside(parts, lead, few + 1)):
        begun = parts[at].rows.count(more) - parts[at].rows.count(tokens[at])
        if begun <= room:
            tokens[at], room = more, room - begun
    return tokens


def _beside(parts: Sequence[Part], lead: int, tokens: int) -> list[int]:
    """What the parts hold where the largest holds so many tokens."""
    return [round(tokens * Fraction(part.share) / Fraction(parts[lead].share)) for part in parts]


def _counts(parts: Sequence[Part], tokens: Sequence[int]) -> list[int]:
    return [part.rows.count(each) for part, each in zip(parts, tokens, strict=True)]


def _largest(parts: Sequence[Part]) -> int:
    return max(range(len(parts)), key=lambda at: parts[at].share)


# The index ----------------------------------------------------------------------------------------------------------


def composed(parts: Sequence[Part], tokens: Sequence[int], cache: Path, tell: Tell) -> BlockIndex:
    """From the cache, or made now: so many tokens of each part, spread evenly over the phase."""
    key = key_of("composed", [[part.key, each] for part, each in zip(parts, tokens, strict=True)])

    def build(beside: Path) -> Facts:
        taken = [part.rows.taken(each) for part, each in zip(parts, tokens, strict=True)]
        blocks = _spread(parts, taken)
        facts = [_facts(part.index.folder) for part in parts]
        saved(blocks.slices, blocks.first, beside)
        stores = [store for each in facts for store in each["stores"]]
        return {"account": asdict(_account(parts, blocks)), "shape": facts[0]["shape"], "stores": stores}

    facts, cached = make_once(cache / "blocks" / key, build, tell)
    return BlockIndex(cache / "blocks" / key, Account(**facts["account"]), cached)


def _facts(folder: Path) -> Facts:
    facts = sealed_facts(folder, thorough=False)
    assert facts is not None, folder  # it was opened a moment ago
    return facts


def _spread(parts: Sequence[Part], taken: Sequence[tuple[Slices, Integers]]) -> Blocks:
    """The rows of all parts, each part's at even distances: row 1 of 2 stands at a quarter, row 2 at three quarters."""
    every, firsts, places = [], [np.zeros(1, np.int64)], []
    stores: list[NDArray[Any]] = []
    said: list[Mask | None] = []
    for part, (slices, first) in zip(parts, taken, strict=True):
        every.append(replace(slices, store=slices.store + len(stores)))
        firsts.append(first[1:] + firsts[-1][-1])
        stores += part.rows.blocks.stores
        said += part.rows.blocks.said or [None] * len(part.rows.blocks.stores)
        places.append((np.arange(len(first) - 1) + 0.5) / max(1, len(first) - 1))
    names = [field.name for field in fields(Slices)]
    slices = Slices(**{name: np.concatenate([getattr(each, name) for each in every]) for name in names})
    whole = Blocks(stores, slices, np.concatenate(firsts), parts[0].rows.blocks.shape, said)
    slices, first = rows_of(whole, np.argsort(np.concatenate(places), kind="stable"))
    return replace(whole, slices=slices, first=first)


def _account(parts: Sequence[Part], blocks: Blocks) -> Account:
    """Of what is in these rows: documents as often as one begins in them; nothing that stayed outside is dropped."""
    slices = blocks.slices
    fresh = replace(slices, length=slices.length - slices.context)  # what comes for the first time
    account = account_of(fresh, fresh, Packed(slices, blocks.first), blocks.shape, blocks.said)
    offsets = [source.store.offsets for part in parts for source in part.sources]
    begun = sum(int(np.isin(slices.start[slices.store == at], each).sum()) for at, each in enumerate(offsets))
    return replace(account, documents=begun)


def tokens_by_source(blocks: Blocks) -> list[int]:
    """How many tokens are trained of each of its stores."""
    labels = labels_of(blocks.slices, blocks.shape.train_context, blocks.said)
    return [int(labels[blocks.slices.store == at].sum()) for at in range(len(blocks.stores))]
