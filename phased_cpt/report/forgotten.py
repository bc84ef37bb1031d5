"""The forgetting matrix as a heat map, and what is computed of it.

            foundation  evolution          colour of a cell, by its own column:
base           3.21        4.00            best ████▒▒▒▒░░░░ base ░░▒▒▓▓ worse than the base
foundation   [ 2.90 ]      3.95            (blue)                 (orange)
evolution      3.00      [ 3.10 ]          framed: the row of the set's own phase
"""

import math
from typing import Any

from phased_cpt.report.folder import Facts, Folder
from phased_cpt.report.logs import number
from phased_cpt.report.written import change, lasted, loss, share, whole

LEVELS = 8  # of each of the two colours
LEAST_SPREAD = 0.05  # nats: a column that moved by less stays pale, for that is noise

MEASURES = {
    "backward_transfer": "backward transfer", "forward_transfer": "forward transfer",
    "forgetting": "forgetting", "drift": "general drift",
}  # fmt: skip


def forgotten(folder: Folder) -> Facts:
    found = folder.forgetting
    sets, rows = _dicts(found.get("sets")), _dicts(found.get("rows"))
    if not sets or not rows:
        off = folder.value("evaluation.matrix") == "off"
        return {"sets": [], "off": off, "finished": folder.state == "finished"}
    names = [str(each["name"]) for each in sets]
    columns = {name: [_of(row, "losses", name) for row in rows] for name in names}
    return {
        "sets": [_set(each) for each in sets],
        "rows": [_row(at, row, names, columns) for at, row in enumerate(rows)],
        "bits": _bits(rows, names),
        "measures": _measures(found, sets),
        "controls": _controls(found),
        "cost": _cost(found),
    }


def _dicts(value: Any) -> list[Facts]:
    return [each for each in value or () if isinstance(each, dict)] if isinstance(value, list) else []


def _of(row: Facts, key: str, name: str) -> float | None:
    values = row.get(key)
    return number(values.get(name)) if isinstance(values, dict) else None


def _set(each: Facts) -> Facts:
    return {"name": each["name"], "general": each.get("kind") == "general", "tokens": whole(each.get("tokens"))}


def _row(at: int, row: Facts, names: list[str], columns: dict[str, list[float | None]]) -> Facts:
    after = row.get("after")
    cells = [_cell(at, after == name, columns[name]) for name in names]
    return {"name": "base" if after is None else after, "is_base": after is None, "cells": cells}


def _cell(at: int, own: bool, column: list[float | None]) -> Facts:
    value, before = column[at], column[at - 1] if at else None
    measured = [each for each in column if each is not None]
    moved = value - before if value is not None and before is not None else None
    return {
        "loss": loss(value),
        "moved": change(moved) if moved is not None else "",
        "rose": moved is not None and moved >= 0.0005,
        "own": own,
        "best": value is not None and at == column.index(min(measured)) and len(measured) > 1,
        "shade": "" if value is None else shade(value, measured),
    }


def shade(value: float, column: list[float]) -> str:
    """b8 of the best of a column, nothing of its base, w8 of what is as far above it as the best is below.

    Near the best a little is seen, by a square root: from random weights to it are five nats, and to forget half of one
    is much.
    """
    base, best = column[0], min(column)
    spread = max(base - best, LEAST_SPREAD)
    if value > base:
        level, colour = min(LEVELS, round(LEVELS * (value - base) / spread)), "w"
    else:
        kept = (base - best) / spread  # 1, but in a column that has hardly moved
        level, colour = round(LEVELS * kept * (1 - math.sqrt((value - best) / ((base - best) or 1.0)))), "b"
    return f"{colour}{level}" if level else ""


def _bits(rows: list[Facts], names: list[str]) -> list[Facts]:
    """The same in bits per byte, which can be held against models of other tokenizers."""
    found = [
        {"name": row.get("after") or "base", "cells": [loss(_of(row, "bits_per_byte", name)) for name in names]}
        for row in rows
    ]
    return found if any(cell != loss(None) for row in found for cell in row["cells"]) else []


def _measures(found: Facts, sets: list[Facts]) -> Facts | None:
    measures = found.get("measures")
    if not isinstance(measures, dict):
        return None
    of_sets, mean = measures.get("sets") or {}, measures.get("mean") or {}
    rows = [_measured(each, of_sets.get(each["name"]) or {}) for each in sets]
    means = {**mean, "drift": mean.get("general_drift")}
    return {
        "names": list(MEASURES.values()),
        "rows": rows,
        "mean": {"final": loss(mean.get("final")), "changes": [change(means.get(key)) for key in MEASURES]},
    }


def _measured(each: Facts, facts: Facts) -> Facts:
    best, after = loss(facts.get("best")), facts.get("best_after")
    return {
        "name": each["name"], "general": each.get("kind") == "general",
        "base": loss(facts.get("base")), "best": best, "after": after or ("base" if best != loss(None) else ""),
        "final": loss(facts.get("final")), "changes": [change(facts.get(key)) for key in MEASURES],
        "forgets": (number(facts.get("forgetting")) or 0) >= LEAST_SPREAD,
    }  # fmt: skip


def _controls(found: Facts) -> list[Facts]:
    controls = found.get("controls")
    if not isinstance(controls, dict):
        return []
    return [
        {"phase": phase, "set": name, "loss": loss((facts.get("losses") or {}).get(name)), "forgetting": change(value)}
        for phase, facts in controls.items()
        for name, value in (facts.get("forgetting") or {}).items()
    ]


def _cost(found: Facts) -> str:
    cost = found.get("cost")
    if not isinstance(cost, dict) or number(cost.get("seconds")) is None:
        return ""
    part = f", {share(cost['share'])} of the time of training" if number(cost.get("share")) is not None else ""
    return f"Measuring all this took {lasted(cost['seconds'])}{part}."
