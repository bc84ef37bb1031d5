"""The data of a run once it is prepared: of each phase what is trained and what is held out."""

import functools
import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from phased_cpt.config.allowed import nearest
from phased_cpt.data.account import labels_of
from phased_cpt.data.chunks import Integers, Slices
from phased_cpt.data.composed import Part, tokens_by_source
from phased_cpt.data.index import BlockIndex, Share
from phased_cpt.data.mixing import Scores, row_order
from phased_cpt.data.split import kinship
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.data.tokens import TokenStore
from phased_cpt.errors import InputError
from phased_cpt.plan import PhasePlan
from phased_cpt.schedule import Prepared


class Drawn(NamedTuple):
    """What came of a source, by the tokens that are trained."""

    phase: str  # whose source it is
    source: str
    planned: float  # share
    share: float
    tokens: int
    epochs: float  # passes over its documents


@dataclass(frozen=True)
class PreparedSplit:
    """One side of a phase."""

    index: BlockIndex
    shares: tuple[Share, ...]  # its own documents
    seconds: float  # that it took now
    parts: tuple[Part, ...] = ()  # of a whole phase that is made up of several
    epochs: float | None = None  # of its own documents, in such a phase

    @property
    def stores(self) -> list[TokenStore]:
        return [share.store for share in self.shares]

    @property
    def sources(self) -> list[Share]:
        """In the order of the index, which knows them by number."""
        return [source for part in self.parts for source in part.sources] or list(self.shares)

    def drawn(self, phase: str) -> list[Drawn]:
        """What was planned of each source, and what came of it: in an epoch, or in a whole phase."""
        parts = [(part.phase, part.sources, part.index, part.share) for part in self.parts]
        tokens = iter(tokens_by_source(self.index.blocks))
        found = []
        for whose, sources, index, share in parts or [(phase, self.shares, self.index, 1.0)]:
            sizes = [source.weight * _labels(source) for source in sources]
            for source, size, once in zip(sources, sizes, tokens_by_source(index.blocks), strict=True):
                each, planned = next(tokens), share * size / (sum(sizes) or 1)
                realised = each / self.index.account.tokens_trained
                epochs = each / once * source.weight if once else 0.0
                found.append(Drawn(whose, source.store.name, planned, realised, each, epochs))
        return found

    def replayed(self, phase: str) -> list[Drawn]:
        """What came of each earlier phase, its sources together."""
        drawn, found = [each for each in self.drawn(phase) if each.phase != phase], []
        for name in dict.fromkeys(each.phase for each in drawn):
            of = [each for each in drawn if each.phase == name]
            planned, share = sum(each.planned for each in of), sum(each.share for each in of)
            tokens, once = sum(each.tokens for each in of), sum(each.tokens / each.epochs for each in of if each.epochs)
            sources = ", ".join(each.source for each in of)
            found.append(Drawn(name, sources, planned, share, tokens, tokens / once if once else 0.0))
        return found

    @functools.cached_property
    def digests(self) -> Scores:
        """Of its documents, each once."""
        return np.concatenate([share.store.digests[share.documents] for share in self.shares])

    @property
    def cached(self) -> bool:
        return self.index.cached and all(store.cached for store in self.stores)

    @property
    def megabytes_per_second(self) -> float | None:
        """Of the sources that were tokenised now, if any were."""
        made = [store for store in self.stores if not store.cached]
        megabytes, seconds = sum(store.facts["bytes"] for store in made) / 1e6, sum(store.seconds for store in made)
        return round(megabytes / seconds, 1) if made else None

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
        return Prepared(account.blocks, account.tokens_trained, self.train.epochs)

    def order(self, epochs: float) -> Integers:
        """Which block is trained when; those of a whole phase lie in order, and have their epochs in them."""
        if self.train.parts:
            return np.arange(self.train.index.account.blocks)
        shuffle = self.plan.settings.data.shuffle
        return row_order(self.train.index.account.blocks, epochs, *self.plan.data_seed, shuffle=shuffle)


def _labels(share: Share) -> int:
    """What can be trained of its documents, were none of them cut."""
    begins = np.asarray(share.store.offsets)[share.documents]
    lengths = np.diff(share.store.offsets)[share.documents]
    documents = Slices.of_documents(np.zeros(len(begins), np.int64), begins, lengths)
    return int(labels_of(documents, said=[share.store.said]).sum())


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
    general: dict[str, PreparedSplit] = field(default_factory=dict)  # evaluation.general: never trained

    def held_out(self, name: str) -> PreparedSplit:
        """What is measured under this name: of a phase, or a general set."""
        found = {phase.plan.name: phase.eval for phase in self.phases} | dict(self.general)
        if (split := found.get(name)) is None:
            raise InputError(f"{name} holds nothing out (data.eval_share is 0, and it has no eval_sources)")
        return split

    def duplicates(self, phase: str, side: str) -> int:
        """Documents that are an exact copy of an earlier one on the same side."""
        sides, counts = self._kinship
        at = sides.index((phase, side))
        return int(counts[at, at])

    def copies(self) -> list["Copies"]:
        """Exact copies of documents of one side on another that is trained, each pair once."""
        sides, counts = self._kinship
        found, splits = [], self._splits
        for at, other in itertools.permutations(range(len(sides)), 2):
            trained_twice = sides[at][1] == sides[other][1] == "train" and at < other
            leaks = sides[at][1] == "eval" and sides[other][1] == "train"
            if counts[at, other] and (trained_twice or leaks):
                of = len(splits[sides[at]].digests)
                found.append(Copies(sides[other], sides[at], int(counts[at, other]), of))
        return found

    @property
    def _splits(self) -> dict[tuple[str, str], PreparedSplit]:
        splits = {(phase.plan.name, side): split for phase in self.phases for side, split in phase.splits.items()}
        return splits | {(name, "eval"): split for name, split in self.general.items()}

    @functools.cached_property
    def _kinship(self) -> tuple[list[tuple[str, str]], Integers]:
        return list(self._splits), kinship([split.digests for split in self._splits.values()])

    def phase(self, name: str) -> PreparedPhase:
        found = {phase.plan.name: phase for phase in self.phases}
        if name not in found:
            raise InputError(f"no phase is called {name!r}{nearest(name, found)} (phases: {', '.join(found)})")
        return found[name]
