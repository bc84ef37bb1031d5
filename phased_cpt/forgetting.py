"""What each phase taught, and what it made the model forget: the arithmetic of the matrix, in nats a token.

                 foundation   evolution   wiki (never trained)
base             R[0,1]       R[0,2]      R[0,w]                  gain of a phase      R[k-1,k] - R[k,k]
foundation       R[1,1]       R[1,2]      R[1,w]                  forgetting of it     R[last,k] - lowest of its column
evolution        R[2,1]       R[2,2]      R[2,w]                  general drift        R[last,w] - R[0,w]

A cell that was not measured is None, and so is whatever needs it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Losses = Mapping[str, float | None]


@dataclass(frozen=True)
class Row:
    """The losses of some weights on every set."""

    after: str | None  # the phase that has published them; None: the base
    losses: Losses
    seconds: float = 0.0


def measures(phases: Sequence[str], general: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """Of each set, and their means: `phases` in the order of the curriculum, `rows` in that of time."""
    at = {row.after: row for row in rows}
    trained = [name for name in phases if name in at]
    sets = {name: _of_phase(name, phases, rows, at) for name in phases}
    sets |= {name: _of_general(name, rows) for name in general}
    earlier = trained[:-1]  # the last one had no chance to be forgotten
    mean = {
        "final": _mean(sets[name]["final"] for name in phases),
        "backward_transfer": _mean(sets[name]["backward_transfer"] for name in earlier),
        "forward_transfer": _mean(sets[name]["forward_transfer"] for name in phases[1:]),
        "forgetting": _mean(sets[name]["forgetting"] for name in earlier),
        "general_drift": _mean(sets[name]["drift"] for name in general),
    }
    return {"sets": sets, "mean": mean}


def _of_phase(name: str, phases: Sequence[str], rows: Sequence[Row], at: Mapping[str | None, Row]) -> dict[str, Any]:
    column, final = _column(name, rows)
    index = phases.index(name)
    before = phases[index - 1] if index else None
    is_last = bool(rows) and rows[-1].after == name
    own = at[name].losses.get(name) if name in at else None
    best = min(column, key=lambda row: row.losses[name] or 0.0) if column else None
    lowest = best.losses[name] if best else None
    ahead = at[before].losses.get(name) if index and before in at else None
    return {
        "base": _base(name, rows),
        "best": lowest,
        "best_after": best.after if best else None,
        "final": final,
        # Good where it is positive: what later phases have added to it.
        "backward_transfer": None if is_last else _difference(own, final),
        # … and what earlier ones had given it, before it was trained itself.
        "forward_transfer": _difference(_base(name, rows), ahead) if index else None,
        "forgetting": _difference(final, lowest) if name in at else None,
    }


def _of_general(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    column, final = _column(name, rows)
    best = min(column, key=lambda row: row.losses[name] or 0.0) if column else None
    base = _base(name, rows)
    return {
        "base": base,
        "best": best.losses[name] if best else None,
        "best_after": best.after if best else None,
        "final": final,
        "drift": _difference(final, base),
    }


def _column(name: str, rows: Sequence[Row]) -> tuple[list[Row], float | None]:
    """Where the set was measured, and what the last row says of it."""
    return [row for row in rows if row.losses.get(name) is not None], rows[-1].losses.get(name) if rows else None


def _base(name: str, rows: Sequence[Row]) -> float | None:
    return rows[0].losses.get(name) if rows and rows[0].after is None else None


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def bits_per_byte(loss: float | None, tokens: int, text_bytes: int | None) -> float | None:
    """The same loss, whatever the tokenizer: in bits, over the bytes of the texts."""
    return None if loss is None or not text_bytes else loss * tokens / math.log(2) / text_bytes


# Gates ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a phase was held against, and whether it has held it."""

    max_forgetting: float | None
    min_gain: float | None
    forgetting: float | None  # of the set that has lost most; None where there is none to lose
    worst: str | None
    gain: float | None
    passed: bool
    unknown: bool = False  # an earlier set has no number to be held against

    def __str__(self) -> str:
        told = ["what was measured of an earlier set is no number"] if self.unknown else []
        if self.max_forgetting is not None and self.forgetting is not None:
            told.append(f"{self.worst} stands {self.forgetting:+.4f} above its best (at most {self.max_forgetting:g})")
        if self.min_gain is not None:
            gain = "unknown" if self.gain is None else f"{self.gain:+.4f}"
            told.append(f"its own held-out loss fell by {gain} (at least {self.min_gain:g})")
        return "; ".join(told)


def judged(
    max_forgetting: float | None,
    min_gain: float | None,
    best_so_far: Losses,
    losses: Losses,
    own: tuple[float | None, float | None],
) -> Verdict:
    """Of the weights that are to be published; `own`: the phase's own set before and after. What is no number fails."""
    pairs = {name: (losses.get(name), best) for name, best in best_so_far.items()}
    lost = {name: one - other for name, (one, other) in pairs.items() if one is not None and other is not None}
    unknown = len(lost) < len(best_so_far)
    worst = max(lost, key=lambda name: lost[name]) if lost else None
    forgetting, gain = lost[worst] if worst else None, _difference(*own)
    forgets = max_forgetting is not None and (unknown or (forgetting is not None and forgetting > max_forgetting))
    learns = min_gain is None or (gain is not None and gain >= min_gain)
    return Verdict(max_forgetting, min_gain, forgetting, worst, gain, learns and not forgets, unknown and forgets)
