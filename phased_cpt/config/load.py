"""A file and the command line become one configuration, or a list of everything that is wrong with them.

bytes ─ read ─ values + places ─ --set ─ secrets? ─ schema? ─ rules? ─→ Loaded, or ConfigError with all problems
"""

from collections.abc import Iterable, Mapping, Sequence
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
    found = [*written.problems, *(problem for text in overrides for problem in override(written, text))]
    secrets = dict(secrets_in(written.values))
    _take_out(written.values, secrets)
    found += [(keys, _placed(problem, keys, written)) for keys, problem in secrets.items()]
    return _finish(written, found)


def from_objects(config: RunConfig) -> Loaded:
    """A configuration that was built in Python, held against the same rules as a file."""
    values = config.model_dump(mode="json", exclude_unset=True)
    return _finish(Written(values, dict.fromkeys(_set_in(config, ()), "Python")), [])


def _finish(written: Written, found: list[tuple[Keys, Problem]]) -> Loaded:
    """Hold the values against the schema, and what is right of them against the rules."""
    config, refused = _validate(written)
    found += refused.items()
    if config is not None:
        found += _broken_rules(config, written, [keys for keys, _ in found])
    if config is None or found:
        raise ConfigError(sorted({problem for _, problem in found}, key=_by_place))
    return Loaded(config, written.places)


def _validate(written: Written) -> tuple[RunConfig | None, dict[Keys, Problem]]:
    """The configuration, of what the schema does not refuse; None where too little is left."""
    try:
        return RunConfig.model_validate(written.values), {}
    except ValidationError as error:
        problems = _translate(error, written)
    _take_out(written.values, problems)
    try:
        return RunConfig.model_validate(written.values), problems
    except ValidationError:
        return None, problems


def _take_out(values: Any, refused: Iterable[Keys]) -> None:
    """Remove refused values, so that the rules can read the rest; what cannot be missing gets a stand-in."""
    for *above, last in refused:
        at = values
        for key in above:
            at = at[key]
        in_a_phase = above[:1] == ["phases"]
        if above == ["phases"]:
            at[last] = {"name": f"phase-{last}", "sources": ["?"]}
        elif isinstance(at, list) or (in_a_phase and last == "path"):
            at[last] = "?"  # an item of a list leaves its place to nobody: the others keep their index
        elif in_a_phase and len(above) == 2 and last in ("name", "sources"):
            at[last] = f"phase-{above[1]}" if last == "name" else ["?"]
        else:
            at.pop(last, None)


# rules ---------------------------------------------------------------------------------------------------------------


def _broken_rules(config: RunConfig, written: Written, refused: list[Keys]) -> list[tuple[Keys, Problem]]:
    """What the rules find of the values that were not refused."""
    a_phase_is_missing = any(keys[:1] == ("phases",) and len(keys) < 3 for keys in refused)
    found = []
    for rule in RULES:
        for index, message in rule.check(config):
            compared = [keys for name in rule.compares for keys in _places_of(name, index)]
            missing = index is not None and a_phase_is_missing
            if not missing and not any(_touches(keys, bad) for keys in compared for bad in refused):
                in_phase_first = sorted(compared, key=lambda keys: len(keys) < 4)
                near = next((keys for keys in in_phase_first if keys in written.places), None)
                keys = near or compared[-1 if rule.compares[0].startswith("phase.") else 0]
                found.append((keys, _placed(Problem(_path(keys, written.values), message), keys, written)))
    return found


def _places_of(name: str, index: int | None) -> list[Keys]:
    """Where `training.learning_rate` can be written: in the run, and in the phase that is spoken of."""
    section, _, key = name.partition(".")
    if section == "phase":
        return [("phases", index, key)] if index is not None else []
    in_phase: list[Keys] = [("phases", index, section, key)] if index is not None and section in OVERRIDABLE else []
    return [(section, key), *in_phase]


def _touches(keys: Keys, refused: Keys) -> bool:
    """A refused value is what is compared, holds it, or is a part of it."""
    return keys == refused[: len(keys)] or refused == keys[: len(refused)]


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


def _by_place(problem: Problem) -> tuple[str, int, list[tuple[int, str]]]:
    """By line, and by path as people count: item 9 before item 10."""
    name, _, line = problem.where.rpartition(":")
    path = [(int(part) if part.isdecimal() else -1, part) for part in problem.path.split(".")]
    return (name, int(line), path) if line.isdecimal() else (problem.where, 0, path)


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
