"""A file and the command line become one configuration, or a list of everything that is wrong with them.

bytes ─ read ─ values + places ─ --set ─ secrets? ─ schema? ─ rules? ─→ Loaded, or ConfigError with all problems
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phased_cpt.config.allowed import allowed, choices_at, keys_at, nearest, takes_text
from phased_cpt.config.inherit import OVERRIDABLE
from phased_cpt.config.override import override
from phased_cpt.config.read import Keys, Written, dotted, read_file
from phased_cpt.config.rules import RULES
from phased_cpt.config.schema import RunConfig, Section
from phased_cpt.config.secrets import secrets_in
from phased_cpt.errors import ConfigError, Problem


@dataclass(frozen=True)
class Loaded:
    """A valid configuration, and where each value that was written comes from."""

    config: RunConfig
    places: Mapping[Keys, str] = field(default_factory=dict)  # ("run", "seed") → "run.yaml:3", or "--set"


def load(path: Path | str, overrides: Sequence[str] = ()) -> Loaded:
    """Read, override and check a configuration; ConfigError holds every problem at once."""
    written = read_file(Path(path))
    problems = list(written.problems)
    for text in overrides:
        problems += override(written, text)
    secrets = dict(secrets_in(written.values))
    for keys, problem in secrets.items():
        problems.append(_placed(problem, keys, written))
        _take_out(written.values, keys)
    return _finish(written, problems, refused=list(secrets))


def from_objects(config: RunConfig) -> Loaded:
    """A configuration that was built in Python, held against the same rules as a file."""
    written = Written(config.model_dump(mode="json", exclude_unset=True), dict.fromkeys(_set_in(config, ()), "Python"))
    return _finish(written, [], refused=[])


def _finish(written: Written, problems: list[Problem], refused: list[Keys]) -> Loaded:
    config, found = _validate(written, refused)
    if config is None or problems or found:
        raise ConfigError(sorted({*problems, *found}, key=_by_place))
    return Loaded(config, written.places)


def _validate(written: Written, refused: list[Keys]) -> tuple[RunConfig | None, list[Problem]]:
    """The configuration and its problems: what the schema refuses, and what the rules say of the rest."""
    try:
        config = RunConfig.model_validate(written.values)
        return config, _broken_rules(config, written, refused)
    except ValidationError as error:
        problems = _translate(error, written)
    for keys in sorted(problems, key=str, reverse=True):  # from the back, so that indices in lists stay true
        _take_out(written.values, keys)
    try:
        config = RunConfig.model_validate(written.values)
    except ValidationError:
        return None, list(problems.values())
    return None, [*problems.values(), *_broken_rules(config, written, [*refused, *problems])]


def _broken_rules(config: RunConfig, written: Written, refused: list[Keys]) -> list[Problem]:
    """What the rules find, but for what they say of values that were refused already."""
    if any(keys[0] == "phases" and len(keys) < 3 for keys in refused):
        return []  # a whole phase is missing: the rules would speak of a curriculum that nobody wrote
    found = []
    for rule in RULES:
        for keys, message in rule(config):
            place = _where_it_is_set(keys, written)
            found.append(_placed(Problem(_path(place, written.values), message), place, written))
    names = [str(keys[-1]) if "_" in str(keys[-1]) else dotted(keys[-2:]) for keys in refused]
    return [problem for problem in found if not any(name in f"{problem.path} {problem.message}" for name in names)]


def _where_it_is_set(keys: Keys, written: Written) -> Keys:
    """A phase's value is the run's where the phase has none of its own: that is the line to change."""
    inherited = keys[0] == "phases" and len(keys) > 3 and keys[2] in OVERRIDABLE and keys not in written.places
    return keys[2:] if inherited else keys


def _take_out(values: Any, keys: Keys) -> None:
    """Remove a refused value; what cannot be missing gets a stand-in, so that the rules can read the rest."""
    *above, last = keys
    for key in above:
        values = values[key]
    stand_ins = (
        {"name": f"phase-{keys[1]}", "sources": ["?"], "path": "?"} if len(above) > 1 and above[0] == "phases" else {}
    )
    if last in stand_ins:
        values[last] = stand_ins[str(last)]
    elif isinstance(values, list):
        del values[int(last)]
    else:
        values.pop(last, None)


# pydantic's findings in our words ------------------------------------------------------------------------------------


def _translate(error: ValidationError, written: Written) -> dict[Keys, Problem]:
    """One problem for each place."""
    found: dict[Keys, Problem] = {}
    for detail in error.errors(include_url=False, include_context=False):
        keys, value = _locate(detail["loc"], written.values)
        if detail["type"] == "missing":
            keys = (*keys, detail["loc"][-1])
            message = f"nothing given; needed: {allowed(keys)}"
        elif detail["type"] == "extra_forbidden":
            known = keys_at(keys[:-1])
            message = f"no such key here{nearest(keys[-1], known)} (keys here: {', '.join(known)})"
        else:
            message = _wrong_value(keys, value)
        found.setdefault(keys, _placed(Problem(_path(keys, written.values), message), keys, written))
    # A list that has lost a bad item is "too short" to pydantic: only the innermost finding is the user's.
    return {keys: problem for keys, problem in found.items() if not any(_is_inside(other, keys) for other in found)}


def _locate(loc: tuple[int | str, ...], at: Any) -> tuple[Keys, Any]:
    """The part of pydantic's location that is a place in the file (it also names validators and union members)."""
    keys: Keys = ()
    for key in loc:
        if key in (at if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()):
            at, keys = at[key], (*keys, key)
    return keys, at


def _wrong_value(keys: Keys, value: Any) -> str:
    hint = nearest(value, choices_at(keys)) if isinstance(value, str) else ""
    if isinstance(value, int | float) and takes_text(keys):
        hint = "; put it in quotes to make it a text"
    return f"given {_shown(value)}; allowed: {allowed(keys)}{hint}"


def _is_inside(keys: Keys, outer: Keys) -> bool:
    return len(keys) > len(outer) and keys[: len(outer)] == outer


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# places --------------------------------------------------------------------------------------------------------------


def _path(keys: Keys, values: Any) -> str:
    """phases.evolution.training.learning_rate, as --set takes it; a name that is itself in question is not used."""
    if len(keys) > 2 and keys[0] == "phases" and keys[2] != "name":
        name = values["phases"][keys[1]].get("name")
        return dotted(("phases", name if isinstance(name, str) else keys[1], *keys[2:]))
    return dotted(keys)


def _placed(problem: Problem, keys: Keys, written: Written) -> Problem:
    """The problem with the place of its value, or of the nearest thing in it or around it that was written."""
    inside = (place for place in written.places if _is_inside(place, keys))
    around = (keys[:n] for n in range(len(keys), -1, -1))
    near = next((place for place in (keys, *inside, *around) if place in written.places), None)
    return Problem(problem.path, problem.message, written.places[near] if near is not None else "")


def _by_place(problem: Problem) -> tuple[str, int, str]:
    name, _, line = problem.where.rpartition(":")
    return (name, int(line), problem.path) if line.isdecimal() else (problem.where, 0, problem.path)


def _set_in(section: Section, keys: Keys) -> list[Keys]:
    """The places of the values that were given to an object, not left at their defaults."""
    found: list[Keys] = []
    for key in section.model_fields_set:
        value = getattr(section, key)
        found.append((*keys, key))
        for index, child in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            if isinstance(child, Section):
                found += _set_in(child, (*keys, key) if index is None else (*keys, key, index))
    return found
