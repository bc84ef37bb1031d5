"""The tables of science.py: means over the seeds, and what t says of them at 95 %; differences are seed by seed."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Facts = dict[str, Any]  # forgetting.json of a run, and its tokens
Runs = Sequence[Facts]  # one for each seed
# Of so many values: half the width of the interval, in standard errors.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def interval(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {T_95[len(values)] * stdev(values) / math.sqrt(len(values)):.{digits}f}"


def seed_by_seed(runs: Sequence[Any], value: Callable[[Any], float]) -> list[float]:
    return [value(each) for each in runs]


def less(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """What the runs of a seed have in common falls out."""
    return [here - there for here, there in zip(one, other, strict=True)]


def loss(row: int, name: str) -> Callable[[Facts], float]:
    return lambda facts: float(facts["rows"][row]["losses"][name])


def mean_loss(row: int, names: Sequence[str]) -> Callable[[Facts], float]:
    return lambda facts: fmean(loss(row, name)(facts) for name in names)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head, *rows = (f"| {' | '.join(row)} |\n" for row in (heads, *lines))
    return "".join([head, f"|{'---|' * len(heads)}\n", *rows])


# 1 --------------------------------------------------------------------------------------------------------------------


def replay_table(
    found: Mapping[tuple[str, str], Mapping[float, Runs]], before: Mapping[tuple[str, str], Runs], home: str
) -> str:
    """By what is new and what was trained, and by share; the runs without replay have the control of all.

    `before`: runs whose first row has what the base loses on the new, which was not planned yet when home was learnt.
    """
    lines, notes = [], []
    for (new, kind), by_share in found.items():
        nothing = by_share[0.0]
        base, control = seed_by_seed(nothing, loss(1, home)), [run["controls"][new]["losses"][home] for run in nothing]
        old = {share: seed_by_seed(runs, loss(-1, home)) for share, runs in by_share.items()}
        ends = {share: seed_by_seed(runs, loss(-1, new)) for share, runs in by_share.items()}
        for share, runs in by_share.items():
            gain = less(seed_by_seed(before[new, kind], loss(0, new)), ends[share])
            cost = interval(less(ends[share], ends[0.0])) if share else ""
            forgotten = [interval(less(old[share], other)) for other in (base, control)]
            tokens = f"{fmean(run['tokens'][1] for run in runs):,.0f}"
            lines.append([new, kind, f"{100 * share:g} %", *forgotten, interval(gain), cost, tokens])
        pairs = [*itertools.pairwise(by_share), (min(by_share), max(by_share))]
        told = [
            f"f({100 * one:g} %) − f({100 * other:g} %) = {interval(less(old[one], old[other]))}"
            for one, other in pairs
        ]
        notes.append(f"{new}, {kind}: {'; '.join(told)}; the control less the base {interval(less(control, base))}.\n")
    heads = ["new", "trained", "replay", "forgetting, against the base", "… the control", "gain on the new", "cost"]
    return "\n".join([table([*heads, "tokens"], lines), *notes])


# 2 --------------------------------------------------------------------------------------------------------------------


def handover_table(found: Mapping[str, Runs], names: Sequence[str], home: str) -> str:
    """In brackets: less that of the first. One that has no row for each phase has trained them at once."""
    lines: list[list[str]] = []
    first = next(iter(found.values()))
    measures = {
        "gain of a phase": _gain(names),
        "forgetting": lambda run: float(run["measures"]["mean"]["forgetting"]),
        f"{', '.join(names)} at the end": mean_loss(-1, names),
        f"drift of {home}": lambda run: loss(-1, home)(run) - loss(0, home)(run),
    }
    for policy, runs in found.items():
        in_turn, cells = len(runs[0]["rows"]) > len(names), []
        for name, measure in measures.items():
            values = seed_by_seed(runs, measure) if in_turn or name not in ("gain of a phase", "forgetting") else []
            against = (
                f" ({interval(less(values, seed_by_seed(first, measure)))})" if values and runs is not first else ""
            )
            cells.append(f"{interval(values)}{against}" if values else "")
        lines.append([policy, *cells, f"{fmean(sum(run['tokens']) for run in runs):,.0f}"])
    return table(["handover", *measures, "tokens"], lines)


def _gain(names: Sequence[str]) -> Callable[[Facts], float]:
    """Of each phase on its own set, from the base to where the phase has ended."""
    return lambda run: fmean(loss(0, name)(run) - loss(at, name)(run) for at, name in enumerate(names, 1))


# 3 --------------------------------------------------------------------------------------------------------------------


def sweep_table(found: Mapping[tuple[str, str], Sequence[Sequence[Facts]]], home: str) -> str:
    """By what is new and what was trained: the lines of `sweep-lambda`, of each seed."""
    lines = []
    for (new, kind), sweeps in found.items():
        means = [[fmean((line["losses"][home], line["losses"][new])) for line in one] for one in sweeps]
        best = [min(range(len(each)), key=lambda at, each=each: (each[at], -at)) for each in means]
        for at, strength in enumerate(line["lambda"] for line in sweeps[0]):
            columns = [[one[at]["losses"][name] for one in sweeps] for name in (home, new)]
            mean, whole = [each[at] for each in means], [each[-1] for each in means]
            against = interval(less(mean, whole)) if strength != 1 else ""
            chosen = f"{best.count(at)} of {len(best)}" if at in best else ""
            lines.append([new, kind, f"{strength:g}", *map(interval, columns), interval(mean), against, chosen])
    return table(["new", "trained", "λ", home, "the new", "mean of both", "… less that at λ = 1", "lowest"], lines)
