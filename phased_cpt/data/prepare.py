"""The story of the data of a run: from the sources of every phase to blocks that a model can be trained on.

sources ─ files ─ token stores ─ split ─┬ train: weights ─ packed ─ blocks
                                        └ eval:            packed ─ blocks
"""

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phased_cpt.config import Source as SourceConfig
from phased_cpt.config.schema import Data
from phased_cpt.data.backends import Backends
from phased_cpt.data.blocks import Shape
from phased_cpt.data.cache import key_of
from phased_cpt.data.chunks import Integers
from phased_cpt.data.files import File, find_files, is_hub_id
from phased_cpt.data.hub import downloaded
from phased_cpt.data.index import Packing, Share, block_index, digest_of
from phased_cpt.data.piecework import Source
from phased_cpt.data.prepared import PreparedPhase, PreparedRun, PreparedSplit
from phased_cpt.data.render import Rendering
from phased_cpt.data.split import Taken, held_out
from phased_cpt.data.tokenizer import Tokenizer, load_tokenizer, vocabulary_of
from phased_cpt.data.tokens import TokenStore, Workshop, token_store
from phased_cpt.data.watch import Unwatched, Watcher
from phased_cpt.errors import InputError, Problem
from phased_cpt.plan import PhasePlan, Plan


def prepare(
    plan: Plan, watcher: Watcher | None = None, workers: int | None = None, only: Collection[str] = ()
) -> PreparedRun:
    """The data of every phase, or of these `only`, made now or found in the cache."""
    for phase in plan.phases:
        _require_buildable(phase)
    _require_sources(plan)
    cache = cache_folder(plan)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        mend = "name another with run.output_dir, or run.cache_dir"
        raise InputError(f"{cache}: cannot be written to ({error.strerror}); {mend}") from None
    tokenizer = _tokenizer(plan, cache)
    watcher, workers = watcher or Unwatched(), workers or len(os.sched_getaffinity(0))
    shop = Workshop(tokenizer, Backends(tokenizer, cache, watcher.tell), cache, workers, watcher)
    chosen = [phase for phase in plan.phases if not only or phase.name in only]
    return PreparedRun(tokenizer, tuple(_phase(phase, shop) for phase in chosen))


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
    rows = vocabulary_of(model.from_config if model.from_config is not None else model.name)
    if rows is not None and tokenizer.vocabulary > rows:
        what = f"the model has vocab_size {rows}, and the tokenizer {name} ids up to {tokenizer.vocabulary - 1}"
        raise InputError(f"{what}; take the model's own tokenizer, or vocab_size {tokenizer.vocabulary} or more")
    return tokenizer


# One phase -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parted:
    """A source whose documents are told apart."""

    store: TokenStore
    train: Integers
    eval: Integers


def _phase(phase: PhasePlan, shop: Workshop) -> PreparedPhase:
    started = time.monotonic()
    data, own = phase.settings.data, phase.phase.eval_sources
    parted = [_parted(source, data, bool(own), shop) for source in phase.phase.sources]
    digests = {
        f"sources.{at}": key_of(each.store.facts["digest"], digest_of(each.eval)) for at, each in enumerate(parted)
    }
    shares = [
        Share(each.store, each.train, source.weight, ("weight", phase.seed, phase.name, at))
        for at, (each, source) in enumerate(zip(parted, phase.phase.sources, strict=True))
    ]
    train = _split(phase, shares, "train", shop, started)
    started = time.monotonic()
    if own:
        stores = [_store(source, data, shop) for source in own]
        digests |= {f"eval_sources.{at}": store.facts["digest"] for at, store in enumerate(stores)}
        held = [Share(store, np.arange(store.facts["documents"])) for store in stores]
    else:
        held = [Share(each.store, each.eval) for each in parted if len(each.eval)]
    evaluated = _split(phase, held, "eval", shop, started) if held else None
    return PreparedPhase(phase, train, evaluated, digests)


def _parted(source: SourceConfig, data: Data, all_trained: bool, shop: Workshop) -> _Parted:
    store = _store(source, data, shop)
    share = 0.0 if all_trained else data.eval_share
    memory = shop.cache / "splits" / f"{key_of(str(Path(source.path).expanduser().resolve()), source.split)}.json"
    taken = Taken(memory, data.split_seed)
    lengths = np.diff(store.offsets)
    always = taken.read()
    mask, new = held_out(store.digests, lengths, share, data.split_seed, data.eval_max_tokens, always)
    taken.add(new)
    return _Parted(store, np.flatnonzero(~mask), np.flatnonzero(mask))


def _split(phase: PhasePlan, shares: Sequence[Share], side: str, shop: Workshop, started: float) -> PreparedSplit:
    data = phase.settings.data
    index = block_index(shares, _packing(data, side, shop.tokenizer), shop.cache, shop.watcher.tell)
    if not index.account.blocks:
        few = f"{index.account.tokens_source} tokens do not fill one row of {data.max_tokens}"
        raise InputError(f"{phase.name}: {few}; packing: pad fills the row up, and so does best_fit")
    return PreparedSplit(index, tuple(shares), time.monotonic() - started)


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


def _store(named: SourceConfig, data: Data, shop: Workshop) -> TokenStore:
    source = Source(
        name=named.path + (f" ({named.split})" if named.split else ""),
        files=_files(named, shop),
        rendering=Rendering(data.text_field, dict(data.where), data.parse_special_tokens),
        max_line_bytes=data.max_line_bytes,
        skip_bad=data.on_bad_record == "skip",
        max_bad_share=data.max_bad_share,
    )
    shop.watcher.begin(source.name, sum(file.path.stat().st_size for file in source.files))
    try:
        return token_store(source, data.tokenizer_backend, shop)
    finally:
        shop.watcher.end()


def _files(named: SourceConfig, shop: Workshop) -> list[File]:
    """On the disk; else from the hub, through `datasets` in a process of its own."""
    if _is_of_the_hub(named):
        return find_files(str(downloaded(named.path, named.split, shop.cache)))
    return find_files(named.path, shop.watcher.tell)


def _is_of_the_hub(named: SourceConfig) -> bool:
    return named.split is not None or is_hub_id(named.path)
