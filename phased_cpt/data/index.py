"""The block index of a split: which slices of the token stores make each block. A few arrays, made in seconds.

documents of every source ─ weights ─ shortened? ─ packed ─ counted ─ sealed on disk
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

import numpy as np

from phased_cpt.data.account import Account, account_of
from phased_cpt.data.blocks import Blocks, Shape
from phased_cpt.data.cache import Facts, Tell, key_of, make_once, sealed_facts
from phased_cpt.data.chunks import Integers, Slices, shortened
from phased_cpt.data.mixing import drawn
from phased_cpt.data.packing import PACKERS
from phased_cpt.data.tokens import TokenStore, open_ids, open_said
from phased_cpt.errors import InputError

# Narrow where the values are small: ten million documents are 200 MB of index.
ARRAYS = {"store": np.int32, "start": np.int64, "length": np.int32, "context": np.int32, "shortened": np.bool_}


@dataclass(frozen=True)
class Share:
    """Documents of one token store, and how often they are seen."""

    store: TokenStore
    documents: Integers
    weight: float = 1.0
    seed: tuple[str | int, ...] = ()

    @property
    def key(self) -> list[object]:
        """All that decides which documents are seen how often; no seed has a say in a whole weight."""
        seed = self.seed if self.weight % 1 else None
        return [self.store.folder.name, digest_of(self.documents), self.weight, seed]


def digest_of(documents: Integers) -> str:
    """Of which documents they are."""
    return sha256(documents.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Packing:
    """How the documents of a split fill its blocks."""

    packer: str
    overlap_tokens: int
    chunk_long: bool
    keep_order: bool
    shape: Shape


@dataclass(frozen=True)
class BlockIndex:
    """A split of a phase, ready to be trained on."""

    folder: Path
    account: Account
    cached: bool

    @property
    def blocks(self) -> Blocks:
        return open_blocks(self.folder)


def block_index(shares: Sequence[Share], how: Packing, cache: Path, tell: Tell) -> BlockIndex:
    """From the cache, or made now."""
    folder = cache / "blocks" / key_of("blocks", [share.key for share in shares], asdict(how))

    def build(beside: Path) -> Facts:
        account, slices, first = _packed(shares, how)
        saved(slices, first, beside)
        stores = [
            {"name": share.store.folder.name, "dtype": share.store.facts["dtype"]}
            | ({"said": True} if share.store.said is not None else {})
            for share in shares
        ]
        # Another release may know no tokens that are masked: where there are none, it reads the same as ever.
        figures = {name: figure for name, figure in asdict(account).items() if figure or name != "tokens_masked"}
        return {"account": figures, "shape": asdict(how.shape), "stores": stores}

    facts, cached = make_once(folder, build, tell)
    return BlockIndex(folder, Account(**facts["account"]), cached)


def saved(slices: Slices, first: Integers, folder: Path) -> None:
    """The arrays of an index."""
    for name, dtype in ARRAYS.items():
        np.save(folder / f"{name}.npy", getattr(slices, name).astype(dtype))
    np.save(folder / "first.npy", first)


def _packed(shares: Sequence[Share], how: Packing) -> tuple[Account, Slices, Integers]:
    documents = _joined([_documents(at, share) for at, share in enumerate(shares)])
    seen = documents if how.chunk_long else shortened(documents, how.shape.max_tokens)
    packed = PACKERS[how.packer](seen, how.shape.max_tokens, how.overlap_tokens, how.keep_order)
    said = [share.store.said for share in shares]
    return account_of(documents, seen, packed, how.shape, said), packed.slices, packed.first


def _documents(at: int, share: Share) -> Slices:
    """The documents of a store as often as they are seen; copies are no context of each other."""
    which = share.documents[drawn(len(share.documents), share.weight, *share.seed)]
    offsets = share.store.offsets
    start = np.asarray(offsets)[which]
    return Slices.of_documents(np.full(len(which), at), start, np.asarray(offsets)[which + 1] - start)


def _joined(parts: Sequence[Slices]) -> Slices:
    names = [field.name for field in fields(Slices)]
    return Slices(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def open_blocks(folder: Path) -> Blocks:
    """Blocks of a sealed index; nothing is read before a block is asked for."""
    facts = sealed_facts(folder, thorough=False)
    if facts is None:
        raise InputError(f"{folder}: no block index, or a damaged one; `phased-cpt prepare` makes it")
    tokens = folder.parent.parent / "tokens"
    arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}
    stores = [open_ids(tokens / store["name"], store["dtype"]) for store in facts["stores"]]
    first = np.asarray(np.load(folder / "first.npy", mmap_mode="r"))
    said = [open_said(tokens / store["name"]) if store.get("said") else None for store in facts["stores"]]
    return Blocks(stores, Slices(**arrays), first, Shape(**facts["shape"]), said)
