"""The data of a run once it is prepared: of each phase what is trained and what is held out."""

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from phased_cpt.config.allowed import nearest
from phased_cpt.data.chunks import Integers
from phased_cpt.data.index import BlockIndex, Share
from phased_cpt.data.mixing import Scores, row_order
from phased_cpt.data.split import kinship
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.data.tokens import TokenStore
from phased_cpt.errors import InputError
from phased_cpt.plan import PhasePlan
from phased_cpt.schedule import Prepared


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
        return Prepared(blocks=account.blocks, tokens_trained=account.tokens_trained)

    def order(self, epochs: float) -> Integers:
        """Which block is trained when."""
        shuffle = self.plan.settings.data.shuffle
        return row_order(self.train.index.account.blocks, epochs, *self.plan.data_seed, shuffle=shuffle)


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

    def duplicates(self, phase: str, side: str) -> int:
        """Documents that are an exact copy of an earlier one on the same side."""
        sides, counts = self._kinship
        at = sides.index((phase, side))
        return int(counts[at, at])

    def copies(self) -> list["Copies"]:
        """Exact copies of documents of one side on another that is trained, each pair once."""
        sides, counts = self._kinship
        found = []
        for at, other in itertools.permutations(range(len(sides)), 2):
            trained_twice = sides[at][1] == sides[other][1] == "train" and at < other
            leaks = sides[at][1] == "eval" and sides[other][1] == "train"
            if counts[at, other] and (trained_twice or leaks):
                of = self.phase(sides[at][0]).splits[sides[at][1]].digests
                found.append(Copies(sides[other], sides[at], int(counts[at, other]), len(of)))
        return found

    @functools.cached_property
    def _kinship(self) -> tuple[list[tuple[str, str]], Integers]:
        splits = {(phase.plan.name, side): split for phase in self.phases for side, split in phase.splits.items()}
        return list(splits), kinship([split.digests for split in splits.values()])

    def phase(self, name: str) -> PreparedPhase:
        found = {phase.plan.name: phase for phase in self.phases}
        if name not in found:
            raise InputError(f"no phase is called {name!r}{nearest(name, found)} (phases: {', '.join(found)})")
        return found[name]
