"""The story of the data of a run: from the sources of every phase to blocks that a model can be trained on.

sources ─ files ─ token stores ─ split ─┬ train: weights ─ packed ─ blocks
                                        └ eval:            packed ─ blocks
"""

import functools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from phased_cpt.config import Source as Named
from phased_cpt.config.allowed import nearest
from phased_cpt.config.schema import Data
from phased_cpt.data.backends import Backends
from phased_cpt.data.blocks import Shape
from phased_cpt.data.cache import key_of
from phased_cpt.data.chunks import Integers
from phased_cpt.data.files import File, find_files, is_hub_id
from phased_cpt.data.hub import downloaded
from phased_cpt.data.index import BlockIndex, Packing, Share, block_index
from phased_cpt.data.mixing import Scores, row_order
from phased_cpt.data.piecework import Source
from phased_cpt.data.render import Rendering
from phased_cpt.data.split import Taken, copies, held_out, shared
from phased_cpt.data.tokenizer import Tokenizer, load_tokenizer
from phased_cpt.data.tokens import TokenStore, Workshop, token_store
from phased_cpt.errors import InputError, Problem
from phased_cpt.plan import PhasePlan, Plan
from phased_cpt.schedule import Prepared


class Watcher(Protocol):
    """Who is told how far it has come."""

    def begin(self, what: str, total_bytes: int) -> None:
        """A source is about to be tokenised."""

    def advance(self, count: int) -> None:
        """So many bytes of it more."""

    def end(self) -> None:
        """It is done, or was there already."""

    def tell(self, message: str) -> None:
        """Something that the user should know."""


class Unwatched:
    """Nobody looks on; what the user should know still goes to stderr."""

    def begin(self, what: str, total_bytes: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def end(self) -> None:
        pass

    def tell(self, message: str) -> None:
        sys.stderr.write(f"{message}\n")


@dataclass(frozen=True)
class PreparedSplit:
    """One side of a phase."""

    index: BlockIndex
    shares: tuple[Share, ...]
    seconds: float  # that it took now

    @property
    def stores(self) -> list[TokenStore]:
        return [share.store for share in self.shares]

    @functools.cached_property
    def digests(self) -> Scores:
        """Of its documents, each once."""
        return np.concatenate([share.store.digests[share.documents] for share in self.shares])

    @property
    def duplicates(self) -> int:
        """Documents that are an exact copy of an earlier one on this side."""
        return copies(self.digests)

    @property
    def cached(self) -> bool:
        return self.index.cached and all(store.cached for store in self.stores)

    @property
    def megabytes_per_second(self) -> float | None:
        """Of the sources that were tokenised now, if any were."""
        made = [store for store in self.stores if store.seconds]
        return (
            round(sum(store.facts["bytes"] for store in made) / 1e6 / sum(store.seconds for store in made), 1)
            if made
            else None
        )

    @property
    def backend(self) -> str:
        return " and ".join(sorted({store.facts["backend"] for store in self.stores}))


@dataclass(frozen=True)
class PreparedPhase:
    """The data of a phase; `eval` is None where nothing is held out."""

    plan: PhasePlan
    train: PreparedSplit
    eval: PreparedSplit | None
    source_digests: dict[str, str]  # for the fingerprint of the phase

    @property
    def splits(self) -> dict[str, PreparedSplit]:
        return {"train": self.train} | ({"eval": self.eval} if self.eval else {})

    @property
    def epoch(self) -> Prepared:
        """What a plan needs to know to count steps."""
        account = self.train.index.account
        return Prepared(blocks=account.blocks, tokens_trained=account.tokens_trained)

    def order(self, epochs: float) -> Integers:
        """Which block is trained when."""
        shuffle, seed = self.plan.settings.data.shuffle, ("order", self.plan.seed, self.plan.name)
        return row_order(self.train.index.account.blocks, epochs, *seed, shuffle=shuffle)


class Copies(NamedTuple):
    """How many documents of the second side are in the first one, too."""

    first: tuple[str, str]  # phase and side
    second: tuple[str, str]
    documents: int
    of: int

    @property
    def leaks(self) -> bool:
        """What is trained on is measured, too."""
        return self.second[1] == "eval"

    @property
    def share(self) -> float:
        return self.documents / self.of

    def __str__(self) -> str:
        first, second = (f"{phase} ({side})" for phase, side in (self.first, self.second))
        return f"{self.documents:,} of the {self.of:,} documents of {second} are in {first}, too ({self.share:.1%})"


@dataclass(frozen=True)
class PreparedRun:
    """The data of every phase."""

    tokenizer: Tokenizer
    phases: tuple[PreparedPhase, ...]

    def copies(self) -> list["Copies"]:
        """Exact copies between the sides of phases: those of what is held out, and those of an earlier phase."""
        sides = [
            (phase.plan.name, side, split.digests) for phase in self.phases for side, split in phase.splits.items()
        ]
        pairs = ((one, other) for at, one in enumerate(sides) for other in sides[:at])
        ordered = (pair if pair[0][1] == "train" else pair[::-1] for pair in pairs)
        found = [Copies(one[:2], other[:2], shared(other[2], one[2]), len(other[2])) for one, other in ordered]
        return [copy for copy in found if copy.documents and "train" in (copy.first[1], copy.second[1])]

    def phase(self, name: str) -> PreparedPhase:
        found = {phase.plan.name: phase for phase in self.phases}
        if name not in found:
            raise InputError(f"no phase is called {name!r}{nearest(name, found)} (phases: {', '.join(found)})")
        return found[name]


def prepare(plan: Plan, watcher: Watcher | None = None, workers: int | None = None) -> PreparedRun:
    """The data of every phase, made now or found in the cache."""
    for phase in plan.phases:
        _require_buildable(phase)
    _require_sources(plan)
    cache = cache_folder(plan)
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(plan, cache)
    watcher, workers = watcher or Unwatched(), workers or len(os.sched_getaffinity(0))
    backends = Backends(tokenizer, cache, watcher.tell)
    shop = Workshop(tokenizer, backends, cache, workers, watcher.advance, watcher.tell)
    return PreparedRun(tokenizer, tuple(_phase(phase, _Room(shop, watcher)) for phase in plan.phases))


def cache_folder(plan: Plan) -> Path:
    """Where tokens and blocks are kept: beside the runs, so that every node that sees these sees them."""
    run = plan.config.run
    return Path(run.cache_dir or f"{run.output_dir}/cache").expanduser()


def _require_buildable(phase: PhasePlan) -> None:
    if phase.phase.replay is not None:
        raise InputError(f"phases.{phase.name}.replay: this version does not draw replay yet; take it out")
    if phase.settings.data.assistant_only_loss:
        raise InputError(f"{phase.name}: data.assistant_only_loss: this version trains whole chats; take it out")


def _require_sources(plan: Plan) -> None:
    """Every path of every phase is looked for before anything is made, and all that are wrong are told at once."""
    problems = []
    for phase in plan.phases:
        for key in ("sources", "eval_sources"):
            for source in getattr(phase.phase, key):
                try:
                    if not _is_of_the_hub(source):
                        find_files(source.path)
                except InputError as error:
                    origin = plan.origin("phases", phase.number - 1, key)
                    where = "" if origin.kind == "default" else str(origin)
                    problems.append(Problem(f"phases.{phase.name}.{key}", str(error), where))
    if problems:
        raise InputError("\n".join(map(str, problems)))


def _tokenizer(plan: Plan, cache: Path) -> Tokenizer:
    model = plan.config.model
    name = model.tokenizer or model.name
    if name is None:
        raise InputError("model.tokenizer: nothing given; with model.from_config it must be: hub id, folder or file")
    revision = model.revision if model.tokenizer is None else None
    tokenizer = load_tokenizer(name, revision, model.eos_token, cache)
    rows = model.from_config.get("vocab_size") if isinstance(model.from_config, dict) else None
    if isinstance(rows, int) and tokenizer.vocabulary > rows:
        what = f"model.from_config has vocab_size {rows}, and the tokenizer {name} ids up to {tokenizer.vocabulary - 1}"
        raise InputError(f"{what}; vocab_size must be {tokenizer.vocabulary} or more")
    return tokenizer


# One phase -----------------------------------------------------------------------------------------------------------


class _Room(NamedTuple):
    """What every phase works with."""

    shop: Workshop
    watcher: Watcher


@dataclass(frozen=True)
class _Parted:
    """A source whose documents are told apart."""

    store: TokenStore
    train: Integers
    eval: Integers


def _phase(phase: PhasePlan, room: _Room) -> PreparedPhase:
    started = time.monotonic()
    data, own = phase.settings.data, phase.phase.eval_sources
    parted = [_parted(source, data, bool(own), room) for source in phase.phase.sources]
    digests = {
        f"sources.{at}": key_of(each.store.facts["digest"], _digest(each.eval)) for at, each in enumerate(parted)
    }
    shares = [
        Share(each.store, each.train, source.weight, ("weight", phase.seed, phase.name, at))
        for at, (each, source) in enumerate(zip(parted, phase.phase.sources, strict=True))
    ]
    train = _split(phase, shares, "train", room, started)
    started = time.monotonic()
    if own:
        stores = [_store(source, data, room) for source in own]
        digests |= {f"eval_sources.{at}": store.facts["digest"] for at, store in enumerate(stores)}
        held = [Share(store, np.arange(store.facts["documents"])) for store in stores]
    else:
        held = [Share(each.store, each.eval) for each in parted if len(each.eval)]
    evaluated = _split(phase, held, "eval", room, started) if held else None
    return PreparedPhase(phase, train, evaluated, digests)


def _parted(source: Named, data: Data, all_trained: bool, room: _Room) -> _Parted:
    store = _store(source, data, room)
    share = 0.0 if all_trained else data.eval_share
    memory = room.shop.cache / "splits" / f"{key_of(str(Path(source.path).expanduser().resolve()), source.split)}.json"
    taken = Taken(memory, data.split_seed)
    lengths = np.diff(store.offsets)
    always = taken.read()
    mask, new = held_out(store.digests, lengths, share, data.split_seed, data.eval_max_tokens, always)
    taken.add(new)
    return _Parted(store, np.flatnonzero(~mask), np.flatnonzero(mask))


def _split(phase: PhasePlan, shares: Sequence[Share], side: str, room: _Room, started: float) -> PreparedSplit:
    data = phase.settings.data
    chosen = [_digest(share.documents) for share in shares]
    index = block_index(shares, _packing(data, side, room.shop.tokenizer), chosen, room.shop.cache, room.shop.tell)
    if not index.account.blocks:
        few = f"{index.account.tokens_source} tokens do not fill one row of {data.max_tokens}"
        raise InputError(f"{phase.name}: {few}; packing: pad fills the row up, and so does best_fit")
    return PreparedSplit(index, tuple(shares), time.monotonic() - started)


def _digest(documents: Integers) -> str:
    return sha256(documents.astype("<i8").tobytes()).hexdigest()


def _packing(data: Data, side: str, tokenizer: Tokenizer) -> Packing:
    """Held-out documents are measured whole, and each token once: nothing of them is dropped or counted twice."""
    trained = side == "train"
    return Packing(
        packer="pad" if data.packing == "concat" and not trained else data.packing,
        overlap_tokens=data.overlap_tokens,
        chunk_long=data.chunk_long_samples,
        keep_order=trained and not data.shuffle,
        shape=Shape(
            max_tokens=data.max_tokens,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            train_context=trained and data.overlap_loss == "count",
        ),
    )


def _store(named: Named, data: Data, room: _Room) -> TokenStore:
    source = Source(
        name=named.path + (f" ({named.split})" if named.split else ""),
        files=_files(named, room.shop),
        rendering=Rendering(data.text_field, dict(data.where), data.parse_special_tokens),
        max_line_bytes=data.max_line_bytes,
        skip_bad=data.on_bad_record == "skip",
        max_bad_share=data.max_bad_share,
    )
    room.watcher.begin(source.name, sum(file.path.stat().st_size for file in source.files))
    try:
        return token_store(source, data.tokenizer_backend, room.shop)
    finally:
        room.watcher.end()


def _files(named: Named, shop: Workshop) -> list[File]:
    """On the disk; else from the hub, through `datasets` in a process of its own."""
    if _is_of_the_hub(named):
        return find_files(str(downloaded(named.path, named.split, shop.cache)))
    return find_files(named.path, shop.tell)


def _is_of_the_hub(named: Named) -> bool:
    return named.split is not None or is_hub_id(named.path)
