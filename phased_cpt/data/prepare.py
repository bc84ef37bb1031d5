"""The story of the data of a run: from the sources of every phase to blocks that a model can be trained on.

sources ─ files ─ token stores ─ split ─┬ train: weights ─ packed ─ blocks
                                        └ eval:            packed ─ blocks
"""

import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from phased_cpt.config import Source as SourceConfig
from phased_cpt.config.inherit import with_overlap
from phased_cpt.config.schema import Data
from phased_cpt.data.backends import Backends
from phased_cpt.data.blocks import Shape
from phased_cpt.data.cache import Tell, key_of
from phased_cpt.data.chunks import Integers
from phased_cpt.data.composed import Part
from phased_cpt.data.files import File, find_files, is_hub_id
from phased_cpt.data.hub import downloaded
from phased_cpt.data.index import Packing, Share, block_index, digest_of
from phased_cpt.data.mixing import Scores, shuffled
from phased_cpt.data.piecework import Source
from phased_cpt.data.prepared import PreparedPhase, PreparedRun, PreparedSplit
from phased_cpt.data.render import Rendering
from phased_cpt.data.replay import Pack, control_rows, is_composed, old_parts, own_parts, packer, whole_phase
from phased_cpt.data.split import Taken, held_out
from phased_cpt.data.tokenizer import Tokenizer, load_tokenizer, vocabulary_of
from phased_cpt.data.tokens import TokenStore, Workshop, token_store
from phased_cpt.data.watch import Unwatched, Watcher
from phased_cpt.errors import InputError, Problem
from phased_cpt.plan import PhasePlan, Plan


def prepare(
    plan: Plan,
    watcher: Watcher | None = None,
    workers: int | None = None,
    only: Collection[str] = (),
    control: str | None = None,
) -> PreparedRun:
    """The data of every phase, or of these `only`, made now or found in the cache.

    The phase that is called `control` gets as many rows of the phases before it instead: what it forgets is told by
    the difference to a model that went on with those.
    """
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
    bench = _Bench(plan, shop, control)
    return PreparedRun(tokenizer, tuple(_phase(phase, bench) for phase in chosen), _general(plan, shop))


def cache_folder(plan: Plan) -> Path:
    """Where tokens and blocks are kept: beside the runs, so that every node that sees these sees them."""
    run = plan.config.run
    return Path(run.cache_dir or f"{run.output_dir}/cache").expanduser()


def _require_sources(plan: Plan) -> None:
    """Every path of every phase is looked for before anything is made, and all that are wrong are told at once."""
    problems = []
    for path, keys, source in _named(plan):
        try:
            if not _is_of_the_hub(source):
                find_files(source.path)
        except InputError as error:
            origin = plan.origin(*keys)
            problems.append(Problem(path, str(error), "" if origin.kind == "default" else str(origin)))
    if problems:
        raise InputError("\n".join(map(str, problems)))


def _named(plan: Plan) -> Iterator[tuple[str, tuple[str | int, ...], SourceConfig]]:
    """Every source with its key, and where that stands."""
    for phase in plan.phases:
        for key in ("sources", "eval_sources"):
            for source in getattr(phase.phase, key):
                yield f"phases.{phase.name}.{key}", ("phases", phase.number - 1, key), source
    for name, sources in plan.config.evaluation.general.items():
        for source in sources:
            yield f"evaluation.general.{name}", ("evaluation", "general", name), source


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


@dataclass(frozen=True)
class _Sides:
    """The documents of a phase, told apart."""

    train: tuple[Share, ...]
    eval: tuple[Share, ...]
    digests: dict[str, str]


@dataclass(frozen=True)
class _Bench:
    """Where phases are told apart, each once: a later one may draw from it."""

    plan: Plan
    shop: Workshop
    control: str | None
    told_apart: dict[str, _Sides] = field(default_factory=dict)

    def sides(self, phase: PhasePlan) -> _Sides:
        if phase.name not in self.told_apart:
            self.told_apart[phase.name] = _sides(phase, self.shop)
        return self.told_apart[phase.name]

    def held_out(self, phase: PhasePlan) -> Scores:
        """Of every phase up to this one. Not of later ones: these may change, and what is done may not."""
        sides = [self.sides(each) for each in self.plan.phases[: phase.number]]
        held = [np.asarray(share.store.digests)[share.documents] for side in sides for share in side.eval]
        return np.unique(np.concatenate([np.empty(0, np.uint64), *held]))


def _sides(phase: PhasePlan, shop: Workshop) -> _Sides:
    data, own = phase.settings.data, phase.phase.eval_sources
    parted = [_parted(source, data, bool(own), shop) for source in phase.phase.sources]
    digests = {
        f"sources.{at}": key_of(each.store.facts["digest"], digest_of(each.eval)) for at, each in enumerate(parted)
    }
    shares = [
        Share(each.store, each.train, source.weight, ("weight", phase.seed, phase.name, at))
        for at, (each, source) in enumerate(zip(parted, phase.phase.sources, strict=True))
    ]
    if own:
        stores = [_store(source, data, shop) for source in own]
        digests |= {f"eval_sources.{at}": store.facts["digest"] for at, store in enumerate(stores)}
        held = [Share(store, np.arange(store.facts["documents"])) for store in stores]
    else:
        held = [Share(each.store, each.eval) for each in parted if len(each.eval)]
    return _Sides(tuple(shares), tuple(held), digests)


def _phase(phase: PhasePlan, bench: _Bench) -> PreparedPhase:
    started, shop = time.monotonic(), bench.shop
    sides = bench.sides(phase)
    if is_composed(phase):
        prepared = _composed(phase, bench, started)
    else:
        prepared = PreparedPhase(phase, _split(phase, sides.train, "train", shop, started), None, sides.digests)
    if phase.name == bench.control:
        prepared = _control(prepared, bench)
    started = time.monotonic()
    evaluated = _split(phase, sides.eval, "eval", shop, started) if sides.eval else None
    return replace(prepared, eval=evaluated)


def _composed(phase: PhasePlan, bench: _Bench, started: float) -> PreparedPhase:
    """With what it replays, and by a temperature."""
    sides, cache, tell = bench.sides(phase), bench.shop.cache, bench.shop.watcher.tell
    own = own_parts(
        phase,
        sides.train,
        lambda shares: _split(phase, shares, "train", bench.shop, started).index,
        _packer(phase, bench.shop),
    )
    replay = phase.phase.replay
    names = replay if isinstance(replay, dict) else [each.name for each in _before(phase, bench)] if replay else []
    old = _old(phase, names, bench)
    whole = whole_phase(phase, own, old, cache, tell)
    train = PreparedSplit(whole.index, sides.train, time.monotonic() - started, whole.parts, whole.epochs)
    return PreparedPhase(phase, train, None, sides.digests | _digests(old))


def _control(prepared: PreparedPhase, bench: _Bench) -> PreparedPhase:
    phase, started = prepared.plan, time.monotonic()
    if not (names := [each.name for each in _before(phase, bench)]):
        raise InputError(f"{phase.name} is the first phase: there is nothing before it that could be its control")
    old = _old(phase, names, bench)
    index, parts = control_rows(phase, prepared.epoch, old, bench.shop.cache, bench.shop.watcher.tell)
    epochs = index.account.blocks / prepared.epoch.epoch_blocks
    train = PreparedSplit(index, prepared.train.shares, time.monotonic() - started, parts, epochs)
    return replace(prepared, train=train, source_digests=prepared.source_digests | _digests(old))


def _before(phase: PhasePlan, bench: _Bench) -> tuple[PhasePlan, ...]:
    return bench.plan.phases[: phase.number - 1]


def _old(phase: PhasePlan, names: Collection[str], bench: _Bench) -> dict[str, list[Part]]:
    """What may be replayed of earlier phases."""
    if not names:
        return {}
    held, pack = bench.held_out(phase), _packer(phase, bench.shop)
    earlier = [each for each in _before(phase, bench) if each.name in names]
    return {each.name: old_parts(phase, each, bench.sides(each).train, held, pack) for each in earlier}


def _packer(phase: PhasePlan, shop: Workshop) -> Pack:
    return packer(_packing(phase.settings.data, "train", shop.tokenizer), shop.cache, shop.watcher.tell)


def _digests(old: dict[str, list[Part]]) -> dict[str, str]:
    """What is replayed decides what is learnt: for the fingerprint."""
    shares = {name: [source for part in parts for source in part.sources] for name, parts in old.items()}
    return {
        f"replay.{name}.{at}": key_of(share.store.facts["digest"], digest_of(share.documents))
        for name, each in shares.items()
        for at, share in enumerate(each)
    }


def _general(plan: Plan, shop: Workshop) -> dict[str, PreparedSplit]:
    """What is measured and never trained: the sets of the run, cut and packed as its section `data` says."""
    data, found = with_overlap(plan.config.data, plan.config.data), {}
    for name, sources in plan.config.evaluation.general.items():
        started = time.monotonic()
        stores = [_store(source, data, shop) for source in sources]
        shares = [Share(store, _first(store, data.eval_max_tokens, name)) for store in stores]
        index = block_index(shares, _packing(data, "eval", shop.tokenizer), shop.cache, shop.watcher.tell)
        if not index.account.tokens_trained:
            raise InputError(f"evaluation.general.{name}: no token in it can be measured; give it longer documents")
        found[name] = PreparedSplit(index, tuple(shares), time.monotonic() - started)
    return found


def _first(store: TokenStore, most: int, name: str) -> Integers:
    """Documents in an order of their own, as many as may be measured; one at least."""
    order = shuffled(store.facts["documents"], "general", name)
    lengths = np.diff(store.offsets)[order]
    count = max(1, int(np.searchsorted(np.cumsum(lengths), most, side="right")))
    return np.sort(order[:count])


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
    if index.account.tokens_masked and not index.account.tokens_trained:
        what = "the assistant says nothing in" + (" any of its chats" if side == "train" else " what is held out of it")
        raise InputError(f"{phase.name}: {what}, so data.assistant_only_loss leaves no token; give it other chats")
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
        files=found_files(named, shop.cache, shop.watcher.tell),
        rendering=Rendering(
            data.text_field, dict(data.where), data.parse_special_tokens, assistant_only=data.assistant_only_loss
        ),
        max_line_bytes=data.max_line_bytes,
        skip_bad=data.on_bad_record == "skip",
        max_bad_share=data.max_bad_share,
    )
    shop.watcher.begin(source.name, sum(file.path.stat().st_size for file in source.files))
    try:
        return token_store(source, data.tokenizer_backend, shop)
    finally:
        shop.watcher.end()


def found_files(named: SourceConfig, cache: Path, tell: Tell = lambda message: None) -> list[File]:
    """On the disk; else from the hub, through `datasets` in a process of its own."""
    if _is_of_the_hub(named):
        return find_files(str(downloaded(named.path, named.split, cache)))
    return find_files(named.path, tell)


def _is_of_the_hub(named: SourceConfig) -> bool:
    return named.split is not None or is_hub_id(named.path)
