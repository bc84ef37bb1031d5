"""`--set section.key=value`: what the command line puts where a line of the file would have put it."""

from typing import Any

from phased_cpt.config.allowed import nearest
from phased_cpt.config.read import COMMAND_LINE, Keys, Written, dotted, read_value
from phased_cpt.config.schema import default_phases
from phased_cpt.errors import ConfigError, InputError, Problem


def override(written: Written, text: str) -> list[Problem]:
    """Apply one override; what is wrong with it is returned, and then nothing is changed."""
    address, equals, value_text = text.partition("=")
    if not equals or not address.strip():
        return [_problem("", f"given {text!r}; allowed: section.key=value, such as training.learning_rate=5e-5")]
    try:
        keys = _address(address.strip().split("."), written.values)
        value = read_value(value_text)
        _put(written.values, keys, value)
    except ConfigError as error:
        return list(error.problems)
    except InputError as error:
        return [_problem(address, str(error))]
    for stale in [place for place in written.places if place[: len(keys)] == keys]:
        del written.places[stale]
    written.places.update(dict.fromkeys(_places_of(value, keys), COMMAND_LINE))
    return []


def _address(parts: list[str], values: dict[str, Any]) -> Keys:
    """The keys that a dotted address means; a phase is called by its name or its index (0 is the first)."""
    keys: Keys = tuple(int(part) if part.isdecimal() else part for part in parts)
    if parts[0] != "phases" or len(parts) == 1:
        return keys
    if values.get("phases") is None:  # the phases that hold by default can be overridden too
        values["phases"] = [phase.model_dump(mode="json", exclude_unset=True) for phase in default_phases()]
    phases = values["phases"] if isinstance(values["phases"], list) else []
    names = [str(phase.get("name")) if isinstance(phase, dict) else "" for phase in phases]
    if parts[1] in names:
        return ("phases", names.index(parts[1]), *keys[2:])
    if isinstance(keys[1], int) and keys[1] < len(names):
        return keys
    raise InputError(
        f"no phase {parts[1]!r}{nearest(parts[1], names)} (phases: {', '.join(names)}, or 0 to {len(names) - 1})"
    )


def _put(values: dict[str, Any], keys: Keys, value: Any) -> None:
    """Set one value; mappings that are not there yet are made, lists keep their length."""
    at: Any = values
    for depth, key in enumerate(keys[:-1], start=1):
        at = _inside(at, key, keys[: depth - 1])
        if at is None:
            at = _replace(values, keys[:depth])
    _inside(at, keys[-1], keys[:-1])
    at[keys[-1] if isinstance(at, list) else str(keys[-1])] = value


def _inside(at: Any, key: str | int, above: Keys) -> Any:
    """What stands under a key, or why nothing can."""
    if isinstance(at, dict):
        return at.get(str(key))
    if isinstance(at, list):
        if isinstance(key, int) and key < len(at):
            return at[key]
        raise InputError(f"{dotted(above)} is a list of {len(at)} and has no {key}; the first is 0")
    raise InputError(f"{dotted(above)} is a single value and has no {key}; set {dotted(above)} itself")


def _replace(values: Any, keys: Keys) -> dict[str, Any]:
    """Put an empty mapping where nothing stands yet."""
    at = values
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = {}
    fresh: dict[str, Any] = at[keys[-1]]
    return fresh


def _places_of(value: Any, keys: Keys) -> list[Keys]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [keys] + [place for key, child in children for place in _places_of(child, (*keys, key))]


def _problem(address: str, message: str) -> Problem:
    return Problem(address, message.removeprefix(f"{COMMAND_LINE}:1: "), COMMAND_LINE)
