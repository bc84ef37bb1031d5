"""A file and the command line become one configuration, or a list of everything that is wrong with them.

bytes ─ read ─ values + places ─ --set ─ secrets? ─ schema? ─ rules? ─→ Loaded, or ConfigError with all problems
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phased_cpt.config.allowed import allowed, choices_at, keys_at, nearest
from phased_cpt.config.inherit import OVERRIDABLE
from phased_cpt.config.override import override
from phased_cpt.config.read import Keys, Written, dotted, read_file
from phased_cpt.config.rules import RULES
from phased_cpt.config.schema import RunConfig
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
    refused: list[Keys] = []
    for keys, problem in list(secrets_in(written.values)):
        problems.append(_placed(problem, keys, written))
        refused.append(keys)
        _take_out(written.values, keys)
    config, found = _validate(written, refused)
    problems += found
    if problems or config is None:
        raise ConfigError(sorted(set(problems), key=_by_place))
    return Loaded(config, written.places)


def from_values(values: dict[str, Any]) -> RunConfig:
    """A configuration from plain values, checked like a file (for Python users)."""
    config, problems = _validate(Written(copy.deepcopy(values)), [])
    if problems or config is None:
        raise ConfigError(problems)
    return config


# schema and rules ----------------------------------------------------------------------------------------------------


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
            keys = _where_it_is_set(keys, written)
            found.append(_placed(Problem(_path(keys, written.values), message), keys, written))
    names = [str(keys[-1]) if "_" in str(keys[-1]) else dotted(keys[-2:]) for keys in refused]
    return [problem for problem in found if not any(name in f"{problem.path} {problem.message}" for name in names)]


def _where_it_is_set(keys: Keys, written: Written) -> Keys:
    """A phase's value is the run's where the phase has none of its own: that is the line to change."""
    inherited = keys[0] == "phases" and len(keys) > 3 and keys[2] in OVERRIDABLE and keys not in written.places
    return keys[2:] if inherited else keys


def _translate(error: ValidationError, written: Written) -> dict[Keys, Problem]:
    """pydantic's findings in our words, one for each place."""
    found: dict[Keys, Problem] = {}
    for detail in error.errors(include_url=False):
        keys, value, present = _locate(detail["loc"], written.values)
        message = {"extra_forbidden": _unknown_key, "missing": _nothing_given}.get(detail["type"], _wrong_value)(
            keys, value
        )
        if not present and detail["type"] != "missing":
            continue  # an alternative of a union that the value never meant
        found.setdefault(keys, _placed(Problem(_path(keys, written.values), message), keys, written))
    # A list that has lost a bad item is "too short" to pydantic: only the innermost finding is the user's.
    return {keys: problem for keys, problem in found.items() if not any(_is_inside(other, keys) for other in found)}


def _is_inside(keys: Keys, outer: Keys) -> bool:
    return len(keys) > len(outer) and keys[: len(outer)] == outer


def _locate(loc: tuple[int | str, ...], values: Any) -> tuple[Keys, Any, bool]:
    """The part of pydantic's location that is a place in the file (it also names validators and union members)."""
    keys: Keys = ()
    at = values
    for key in loc:
        if isinstance(at, dict) and key in at or isinstance(at, list) and isinstance(key, int) and key < len(at):
            at, keys = at[key], (*keys, key)
        elif key == loc[-1] and isinstance(at, dict) and key in keys_at(keys):
            return (*keys, key), None, False
    return keys, at, True


def _unknown_key(keys: Keys, _: Any) -> str:
    known = keys_at(keys[:-1])
    return f"no such key here{nearest(keys[-1], known)} (keys here: {', '.join(known)})"


def _nothing_given(keys: Keys, _: Any) -> str:
    return f"nothing given; needed: {allowed(keys)}"


def _wrong_value(keys: Keys, value: Any) -> str:
    hint = nearest(value, choices_at(keys)) if isinstance(value, str) else ""
    if not isinstance(value, str | list | dict | None) and "text" in allowed(keys):
        hint = "; put it in quotes to make it a text"
    return f"given {_shown(value)}; allowed: {allowed(keys)}{hint}"


def _take_out(values: Any, keys: Keys) -> None:
    """Remove a refused value; what cannot be missing gets a stand-in, so that the rules can read the rest."""
    at = values
    for key in keys[:-1]:
        at = at[key]
    stand_in = (
        {"name": f"phase-{keys[1]}", "sources": ["?"], "path": "?"}.get(str(keys[-1])) if keys[0] == "phases" else None
    )
    if stand_in is not None:
        at[keys[-1]] = stand_in
    elif isinstance(at, list):
        del at[int(keys[-1])]
    else:
        at.pop(keys[-1], None)


# places --------------------------------------------------------------------------------------------------------------


def _path(keys: Keys, values: Any) -> str:
    """phases.evolution.training.learning_rate: as --set takes it."""
    if len(keys) > 1 and keys[0] == "phases" and isinstance(keys[1], int):
        phases = values.get("phases")
        phase = phases[keys[1]] if isinstance(phases, list) and keys[1] < len(phases) else None
        name = phase.get("name") if isinstance(phase, dict) else None
        return dotted(("phases", name if isinstance(name, str) and keys[2:] != ("name",) else keys[1], *keys[2:]))
    return dotted(keys)


def _placed(problem: Problem, keys: Keys, written: Written) -> Problem:
    """The problem with the place of its value, or of the nearest thing around it that was written."""
    near = next((keys[:n] for n in range(len(keys), -1, -1) if keys[:n] in written.places), ())
    return Problem(problem.path, problem.message, written.places.get(near, ""))


def _by_place(problem: Problem) -> tuple[str, int, str]:
    name, _, line = problem.where.rpartition(":")
    return (name, int(line), problem.path) if line.isdigit() else (problem.where, 0, problem.path)


def _shown(value: Any) -> str:
    text = {True: "true", False: "false", None: "null"}.get(value) if isinstance(value, bool | None) else repr(value)
    text = text or repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
