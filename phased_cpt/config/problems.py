"""What is wrong with a configuration, in our words: where, what was given, what is allowed, did you mean …"""

from typing import Any

from pydantic import ValidationError

from phased_cpt.config.allowed import allowed, choices_at, keys_at, nearest, takes_text
from phased_cpt.config.read import Keys, Written, as_index, dotted, value_at
from phased_cpt.errors import Problem


def refused_by_schema(error: ValidationError, written: Written) -> dict[Keys, Problem]:
    """pydantic's findings, one for each place."""
    found: dict[Keys, Problem] = {}
    # Of the alternatives of a union, the one that was meant comes first.
    details = sorted(error.errors(include_url=False, include_context=False), key=lambda one: one["type"] != "explained")
    for detail in details:
        keys, value = _locate(detail["loc"], written.values)
        if detail["type"] == "missing":
            keys = (*keys, detail["loc"][-1])
            message = f"nothing given; needed: {allowed(keys)}"
        elif detail["type"] == "extra_forbidden":
            message = _unknown_key(keys, written)
        elif detail["type"] == "explained":
            message = f"given {_shown(value)}; {detail['msg']}"
        else:
            message = _wrong_value(keys, value)
        found.setdefault(keys, placed(message, keys, written))
    # A list that has lost a bad item is "too short" to pydantic: only the innermost finding is the user's.
    return {keys: problem for keys, problem in found.items() if not any(_is_inside(other, keys) for other in found)}


def _locate(loc: tuple[int | str, ...], at: Any) -> tuple[Keys, Any]:
    """The part of pydantic's location that is a place in the file (it also names validators and union members)."""
    keys: Keys = ()
    for key in loc:
        if key in (at if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()):
            at, keys = at[key], (*keys, key)
    return keys, at


def _unknown_key(keys: Keys, written: Written) -> str:
    *above, key = keys
    known = keys_at(tuple(above))
    elsewhere = [(*above, name, key) for name in known if key in keys_at((*above, name))]
    hint = f"; did you mean {path_of(elsewhere[0], written.values)}?" if elsewhere else nearest(key, known)
    return f"no such key here{hint} (keys here: {', '.join(known)})"


def _wrong_value(keys: Keys, value: Any) -> str:
    hint = nearest(value, choices_at(keys)) if isinstance(value, str) else ""
    if isinstance(value, int | float) and takes_text(keys, str(value)):
        hint = "; put it in quotes to make it a text"
    return f"given {_shown(value)}; allowed: {allowed(keys)}{hint}"


def placed(message: str, keys: Keys, written: Written) -> Problem:
    """A problem at the place of its value, or of the nearest thing in it or around it that was written."""
    inside = (place for place in written.places if _is_inside(place, keys))
    around = (keys[:n] for n in range(len(keys), -1, -1))
    near = next((place for place in (keys, *inside, *around) if place in written.places), None)
    return Problem(path_of(keys, written.values), message, written.places[near] if near is not None else "")


def by_place(problem: Problem) -> tuple[str, int, list[tuple[int, str]]]:
    """By line, and by path as people count: item 9 before item 10."""
    name, _, line = problem.where.rpartition(":")
    path = [(-1 if (index := as_index(part)) is None else index, part) for part in problem.path.split(".")]
    return (name, int(line), path) if line.isdecimal() else (problem.where, 0, path)


def path_of(keys: Keys, values: Any) -> str:
    """phases.evolution.training.learning_rate, as --set takes it; a name that is itself in question is not used."""
    if len(keys) > 2 and keys[0] == "phases" and keys[2] != "name":
        phase = value_at(values, keys[:2])
        name = phase.get("name") if isinstance(phase, dict) else None
        return dotted(("phases", name if isinstance(name, str) else keys[1], *keys[2:]))
    return dotted(keys)


def _is_inside(keys: Keys, outer: Keys) -> bool:
    return len(keys) > len(outer) and keys[: len(outer)] == outer


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
