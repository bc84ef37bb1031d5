"""A file and the command line become one configuration, or a list of everything that is wrong with them.

bytes ─ read ─ values + places ─ --set ─ secrets? ─ schema? ─ rules? ─→ Loaded, or ConfigError with all problems
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phased_cpt.config.inherit import OVERRIDABLE
from phased_cpt.config.override import override
from phased_cpt.config.problems import by_place, path_of, placed, refused_by_schema
from phased_cpt.config.read import Keys, Written, places_in, read_file
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
    unreadable = [(keys, replace(problem, path=path_of(keys, written.values))) for keys, problem in written.problems]
    _take_out(written.values, [keys for keys, _ in unreadable if _value_at(written.values, keys) is None])
    found = [*unreadable, *(problem for text in overrides for problem in override(written, text))]
    secrets = {keys: placed(message, keys, written) for keys, message in secrets_in(written.values)}
    _take_out(written.values, secrets)
    return _finish(written, [*found, *secrets.items()])


def from_record(values: dict[str, Any], name: str, overrides: Sequence[str] = ()) -> Loaded:
    """A configuration as a run has kept it, so that the run can go on from its folder alone."""
    written = Written(copy.deepcopy(values), dict.fromkeys(places_in(values, ()), name))
    return _finish(written, [problem for text in overrides for problem in override(written, text)])


def from_objects(config: RunConfig) -> Loaded:
    """A configuration that was built in Python, held against the same rules as a file."""
    values = config.model_dump(mode="json", exclude_unset=True)
    return _finish(Written(values, dict.fromkeys(places_in(values, ()), "Python")), [])


def _finish(written: Written, found: list[tuple[Keys, Problem]]) -> Loaded:
    """Hold the values against the schema, and what is right of them against the rules."""
    config, refused = _validate(written)
    found = [*found, *refused.items()]
    if config is not None:
        found += _broken_rules(config, written, [keys for keys, _ in found])
    if config is None or found:
        raise ConfigError(sorted({problem for _, problem in found}, key=by_place))
    return Loaded(config, written.places)


def _validate(written: Written) -> tuple[RunConfig | None, dict[Keys, Problem]]:
    """The configuration, of what the schema does not refuse; None where too little is left."""
    try:
        return RunConfig.model_validate(written.values), {}
    except ValidationError as error:
        problems = refused_by_schema(error, written)
    _take_out(written.values, problems)
    try:
        return RunConfig.model_validate(written.values), problems
    except ValidationError:
        return None, problems


def _value_at(values: Any, keys: Keys) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else values[int(key)] if isinstance(values, list) else None
    return values


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


def _broken_rules(config: RunConfig, written: Written, refused: list[Keys]) -> list[tuple[Keys, Problem]]:
    """What the rules find; silent about values, and phases, that were refused already."""
    a_phase_is_missing = any(keys[:1] == ("phases",) and len(keys) < 3 for keys in refused)
    found = []
    for rule in RULES:
        for index, message in rule.check(config):
            compared = [keys for name in rule.compares for keys in _places_of(name, index)]
            silent = (index is not None and a_phase_is_missing) or any(
                _touches(keys, bad) for keys in compared for bad in refused
            )
            if not silent:
                keys = _first_written(compared, written)
                found.append((keys, placed(message, keys, written)))
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


def _first_written(compared: list[Keys], written: Written) -> Keys:
    """The place to point at: a value of the phase's own, then one of the run, then the key to change first."""
    own_first = sorted(compared, key=lambda keys: keys[0] != "phases" or len(keys) < 4)
    return next((keys for keys in own_first if keys in written.places), compared[0])
