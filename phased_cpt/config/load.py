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
from phased_cpt.config.read import COMMAND_LINE, Keys, Written, places_in, read_file, value_at
from phased_cpt.config.rules import RULES
from phased_cpt.config.schema import RunConfig
from phased_cpt.config.secrets import scrubbed, secrets_in
from phased_cpt.errors import ConfigError, InputError, Problem


@dataclass(frozen=True)
class Loaded:
    """A valid configuration, and where each value that was written comes from."""

    config: RunConfig
    places: Mapping[Keys, str] = field(default_factory=dict)  # ("run", "seed") → "run.yaml:3", or "--set"

    def in_folder(self, run_dir: str) -> "Loaded":
        """The same, in a run folder that was named on the command line."""
        run = self.config.run.model_copy(update={"dir": run_dir})
        places = {**self.places, ("run", "dir"): COMMAND_LINE}
        return Loaded(self.config.model_copy(update={"run": run}), places)


def load(path: Path | str, overrides: Sequence[str] = ()) -> Loaded:
    """Read, override and check a configuration; ConfigError holds every problem at once."""
    try:
        written = read_file(Path(path))
    except InputError as error:
        raise InputError(scrubbed(str(error))) from None
    return _finish(written, overrides)


def from_record(values: dict[str, Any], name: str, overrides: Sequence[str] = ()) -> Loaded:
    """A configuration as a run has kept it, so that the run can go on from its folder alone."""
    return _finish(Written(copy.deepcopy(values), dict.fromkeys(places_in(values, ()), name)), overrides)


def from_objects(config: RunConfig) -> Loaded:
    """A configuration that was built in Python, held against the same rules as a file."""
    values = config.model_dump(mode="json", exclude_unset=True)
    return _finish(Written(values, dict.fromkeys(places_in(values, ()), "Python")), ())


def _finish(written: Written, overrides: Sequence[str]) -> Loaded:
    """Hold the values against the schema, and what is right of them against the rules."""
    found = [(keys, replace(problem, path=path_of(keys, written.values))) for keys, problem in written.problems]
    _take_out(written.values, [keys for keys, _ in found if value_at(written.values, keys) is None])
    found += [problem for text in overrides for problem in override(written, text)]
    secrets = {keys: placed(message, keys, written) for keys, message in secrets_in(written.values)}
    _take_out(written.values, secrets)
    config, refused = _validate(written)
    found += [*secrets.items(), *refused.items()]
    if config is not None:
        found += _broken_rules(config, written, [keys for keys, _ in found])
    if config is None or found:
        told = {
            replace(problem, path=scrubbed(problem.path), message=scrubbed(problem.message)) for _, problem in found
        }
        raise ConfigError(sorted(told, key=by_place))
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


def _take_out(values: Any, refused: Iterable[Keys]) -> None:
    """Remove refused values, so that the rules can read the rest; what cannot be missing gets a stand-in."""
    for *above, last in refused:
        at: Any = value_at(values, tuple(above))
        in_a_phase = above[:1] == ["phases"]
        if isinstance(at, list):  # an item leaves its place to nobody: the others keep their index
            at[int(last)] = {"name": f"phase-{last}", "sources": ["?"]} if above == ["phases"] else "?"
        elif not isinstance(at, dict):
            continue  # merged in by `<<`, and overridden since
        elif in_a_phase and last == "path":
            at[last] = "?"
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
