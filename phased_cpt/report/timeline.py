"""The curriculum over its working time: phases as bars, stops as breaks, what is to come as outlines.

clock  ├ attempt 1 ┤······ nobody at work ······├ attempt 2 ┤
drawn  ├ attempt 1 ┤∕├ attempt 2 ┤- - - to come - - -┤
"""

import itertools
import time
from dataclasses import dataclass
from typing import Any

from phased_cpt.report.folder import Facts, Folder, FoundPhase
from phased_cpt.report.logs import moment, number
from phased_cpt.report.written import brief_clock, lasted, whole
from phased_cpt.tables.words import counted

BREAK_PERCENT, ALL_BREAKS_PERCENT = 1.6, 20.0  # of the width
UNKNOWN_PERCENT = 8.0  # of a phase that is to come, where nothing says how long it will take


@dataclass(frozen=True)
class Stretch:
    """A time at which somebody worked."""

    begin: float
    end: float


def timeline(folder: Folder) -> Facts:
    """Bars and breaks in percent of the width, and a line a phase."""
    now = time.time()
    stretches = worked(folder, now)
    spans = {phase.number: _span(phase, now) for phase in folder.phases}
    bars, breaks = _drawn(folder, stretches, spans)
    return {
        "bars": bars,
        "breaks": breaks,
        "begin": brief_clock(stretches[0].begin) if stretches else "",
        "end": brief_clock(stretches[-1].end) if stretches else "",
        "phases": [_told(phase, spans[phase.number], stretches) for phase in folder.phases],
        "spoken": _spoken(folder, stretches),
    }


def worked(folder: Folder, now: float) -> list[Stretch]:
    """From the beginning of each attempt to its last sign of life."""
    begins = folder.phases[0].begins if folder.phases else []
    signs = sorted(at for phase in folder.phases for at in (*phase.moments, *_ends(phase)))
    if folder.state == "running":
        signs.append(max(now, signs[-1] if signs else now))
    if not begins and signs:
        begins = signs[:1]
    stretches = []
    for begin, following in zip(begins, [*begins[1:], float("inf")], strict=True):
        seen = [at for at in signs if begin <= at < following]
        stretches.append(Stretch(begin, seen[-1] if seen else begin))
    return stretches


def _ends(phase: FoundPhase) -> list[float]:
    return [at for key in ("started", "finished") if (at := moment(phase.record.get(key))) is not None]


def _span(phase: FoundPhase, now: float) -> Stretch | None:
    """From its first moment to its last; None of a phase that has not begun."""
    begin, end = moment(phase.record.get("started")), moment(phase.record.get("finished"))
    moments = phase.moments
    begin = begin if begin is not None else moments[0] if moments else None
    if begin is None:
        return None
    if end is None:
        end = now if phase.state == "running" else max(moments, default=begin)
    return Stretch(begin, max(begin, end))


def _within(span: Stretch | None, stretch: Stretch) -> Stretch | None:
    if span is None or span.end <= stretch.begin or span.begin >= stretch.end:
        return None
    return Stretch(max(span.begin, stretch.begin), min(span.end, stretch.end))


def _drawn(
    folder: Folder, stretches: list[Stretch], spans: dict[int, Stretch | None]
) -> tuple[list[Facts], list[Facts]]:
    done = sum(each.end - each.begin for each in stretches)
    ahead = _ahead(folder, done)
    a_break = min(BREAK_PERCENT, ALL_BREAKS_PERCENT / max(1, len(stretches) - 1))
    a_second = (100 - a_break * max(0, len(stretches) - 1)) / ((done + sum(ahead.values())) or 1)
    bars, breaks, at = [], [], 0.0
    for stretch in stretches:
        if stretch is not stretches[0]:
            breaks.append({"x": at, "width": a_break})
            at += a_break
        for phase in folder.phases:
            if part := _within(spans[phase.number], stretch):
                x = at + (part.begin - stretch.begin) * a_second
                bars.append(_bar(phase, x, (part.end - part.begin) * a_second, phase.state))
        at += (stretch.end - stretch.begin) * a_second
    for phase in folder.phases:
        if seconds := ahead.get(phase.number):
            bars.append(_bar(phase, at, seconds * a_second, "pending"))
            at += seconds * a_second
    return bars, breaks


def _bar(phase: FoundPhase, x: float, width: float, state: str) -> Facts:
    x, width = round(x, 2), round(max(width, 0.3), 2)
    return {"x": x, "width": width, "number": phase.number, "name": phase.name, "state": state, "wide": width > 14}


def _ahead(folder: Folder, done: float) -> dict[int, float]:
    """Seconds that are to come, by phase: as the last step has told them, else some width."""
    coming = [phase for phase in folder.phases if phase.state != "done"]
    if not coming:
        return {}
    last: dict[str, Any] = next((phase.train[-1] for phase in coming if phase.train), {})
    own, all_of_it = number(last.get("eta_seconds")), number(last.get("curriculum_eta_seconds"))
    if own is not None and all_of_it is not None and done > 0:
        each = max(all_of_it - own, 0.02 * done) / max(1, len(coming) - 1)  # none so small that it is not seen
        return {phase.number: (own if phase.train else each) for phase in coming}
    some = (done or 100.0) * UNKNOWN_PERCENT / 100
    return {phase.number: some for phase in coming}


def _told(phase: FoundPhase, span: Stretch | None, stretches: list[Stretch]) -> Facts:
    pairs = itertools.pairwise(stretches)
    gaps = [after.begin - before.end for before, after in pairs if span and span.begin < before.end < span.end]
    facts = [phase.state]
    if phase.state in ("running", "interrupted") and phase.steps:
        facts.append(f"step {whole(phase.step)} of {whole(phase.steps)}")
    if phase.seconds is not None:
        facts.append(lasted(phase.seconds))
    if phase.tokens:
        facts.append(f"{whole(phase.tokens)} tokens")
    if gaps:
        facts.append(f"stopped {counted(len(gaps), 'time')}, {lasted(sum(gaps))} in all")
    about = phase.settings.get("description")
    return {"number": phase.number, "name": phase.name, "state": phase.state, "about": about, "facts": facts}


def _spoken(folder: Folder, stretches: list[Stretch]) -> str:
    states = "; ".join(f"{phase.name} {phase.state}" for phase in folder.phases)
    return f"{counted(len(folder.phases), 'phase')}, {counted(max(0, len(stretches) - 1), 'stop')}: {states}."
