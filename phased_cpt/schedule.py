"""How long a phase is, how its batches are made up, and how its learning rate goes: arithmetic on plain numbers."""

import math
from dataclasses import dataclass
from fractions import Fraction

from phased_cpt.errors import InputError


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step: `rows` = micro_batch_size × accumulation × ranks."""

    rows: int
    micro_batch_size: int
    accumulation: int
    ranks: int


def batch_of(ranks: int, micro_batch_size: int, accumulation: int, global_rows: int | None = None) -> Batch:
    """The batch on so many ranks; a global batch size decides the accumulation, whatever it was set to."""
    at_once = micro_batch_size * ranks
    if global_rows is None:
        return Batch(at_once * accumulation, micro_batch_size, accumulation, ranks)
    if global_rows % at_once:
        raise InputError(
            f"training.global_batch_size: {global_rows} rows cannot be shared by {ranks} ranks × micro_batch_size "
            f"{micro_batch_size}; take a multiple of {at_once}, or another number of ranks"
        )
    return Batch(global_rows, micro_batch_size, global_rows // at_once, ranks)


@dataclass(frozen=True)
class Prepared:
    """What an epoch of a phase holds, known once its data is prepared; or the whole phase, where it replays."""

    blocks: int
    tokens_trained: int
    epochs: float | None = None  # of its own documents, in the rows of a whole phase, which lie in order

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.tokens_trained < 1:
            raise ValueError(f"an epoch must hold something to train on, not {self}")

    @property
    def epoch_blocks(self) -> int:
        """The rows after which an epoch ends."""
        return self.blocks if self.epochs is None else max(1, round(self.blocks / self.epochs))


@dataclass(frozen=True)
class Budget:
    """How long a phase trains: the one of max_steps, tokens and epochs that rules."""

    unit: str  # "steps", "tokens" or "epochs"
    amount: float

    def steps(self, rows: int | None, prepared: Prepared | None) -> int | None:
        """Optimizer steps; None while the data, or the size of a batch, is not known.

        The epochs follow each other without a gap, and the last batch is filled up with empty rows:
            3 epochs of 5 blocks in batches of 4 → 15 rows → [4] [4] [4] [3 + 1 empty]
        """
        if self.unit == "steps":
            return int(self.amount)
        if rows is None or prepared is None:
            return None
        return -(-(self.rows(prepared) or 0) // rows)

    def rows(self, prepared: Prepared | None) -> int | None:
        """The rows of its epochs or tokens, with which the last batch may end before it is full; None for steps.

        In fractions: 0.1 × 30 is 3.0000000000000004 in floats, and 10^13 tokens times the blocks is beyond them."""
        if self.unit == "steps" or prepared is None:
            return None
        if prepared.epochs is not None:
            return prepared.blocks
        amount = Fraction(repr(self.amount))
        return math.ceil(amount * prepared.blocks / (1 if self.unit == "epochs" else prepared.tokens_trained))


@dataclass(frozen=True)
class Cooling:
    """A phase that is to stop early goes down from the rate that it has: begun after so many steps, over so many."""

    begin: int
    steps: int

    @property
    def end(self) -> int:
        return self.begin + self.steps


FEWEST_COOLING = 10  # steps; fewer are a cut
HIGH = 0.1  # of the way from the floor to the peak: below it there is nothing to cool down from


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a phase as a function of the optimizer steps that are done, and of nothing else.

    cosine    /‾\\_        linear   /\\        constant  /‾‾‾‾        wsd  /‾‾‾‾\\        infinite  /\\____|_____|___\\
    The first step has a rate above zero, the peak comes right after the warm-up, and past the end the floor holds. Each
    phase warms up anew; of `infinite` only the first in a row does, and only the last goes down in the end.
    """

    shape: str
    peak: float
    steps: int
    warmup_steps: int = 0
    decay_steps: int = 0  # of wsd and of infinite, at the end; others decay all the way from the peak
    min_ratio: float = 0.0
    cooldown_steps: int = 0  # of infinite: from the peak to its constant rate
    constant_ratio: float = 1.0  # of infinite: that rate, as a share of the peak

    def rate(self, done: int, cooling: Cooling | None = None) -> float:
        """The rate of the step that follows `done` steps."""
        if cooling is not None and done > cooling.begin:
            progress = min(1.0, (done - cooling.begin) / cooling.steps)
            return self.floor + (self.rate(cooling.begin) - self.floor) * (1 - math.sqrt(progress))
        if done < self.warmup_steps:
            return self.peak * (done + 1) / (self.warmup_steps + 1)
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * self._height(done))

    @property
    def floor(self) -> float:
        """The rate that a phase ends at, if it goes down at all: before another `infinite` none does."""
        goes_on = self.shape == "infinite" and not self.decay_steps
        return self.peak * (self.constant_ratio if goes_on else self.min_ratio)

    def cooling(self, done: int, ratio: float, left: int) -> Cooling | None:
        """How a phase that is to stop after `done` steps cools down first; None where its rate is low already."""
        if not ratio or left < 1 or self.rate(done) - self.floor <= HIGH * (self.peak - self.floor):
            return None
        return Cooling(done, min(left, max(FEWEST_COOLING, share_of(done, ratio))))

    def _height(self, done: int) -> float:
        """1 at the peak, 0 at the end."""
        if self.shape == "constant":
            return 1.0
        at_the_end = self.shape in ("wsd", "infinite")
        begin = self.steps - self.decay_steps if at_the_end else self.warmup_steps
        progress = min(1.0, max(0.0, (done - begin) / max(1, self.steps - begin)))
        match self.shape:
            case "linear":
                return 1 - progress
            case "cosine":
                return _half_a_wave(progress)
            case "wsd":
                return 1 - math.sqrt(progress)  # reported to be a good shape: docs/decisions/0006
            case "infinite":
                return self._level(done) * (1 - math.sqrt(progress if self.decay_steps else 0.0))
        raise ValueError(f"no learning rate of shape {self.shape!r}")

    def _level(self, done: int) -> float:
        """Of infinite before its end: down to the constant rate, and then that."""
        constant = (self.constant_ratio - self.min_ratio) / (1 - self.min_ratio) if self.min_ratio < 1 else 1.0
        progress = min(1.0, (done - self.warmup_steps) / self.cooldown_steps) if self.cooldown_steps else 1.0
        return constant + (1 - constant) * _half_a_wave(progress)


def _half_a_wave(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def share_of(steps: int, ratio: float) -> int:
    """A share of the steps, rounded up (0.03 of 100 steps is 3, not 4)."""
    return math.ceil(Fraction(repr(ratio)) * steps)


def evaluation_steps(steps: int, every: int, rows: int, blocks: int) -> frozenset[int]:
    """The steps after which a phase is evaluated: every so many, where an epoch ends within one, and the last."""
    epochs = steps * rows // blocks
    return frozenset(
        {*range(every, steps, every), *(-(-epoch * blocks // rows) for epoch in range(1, epochs + 1)), steps}
    )
