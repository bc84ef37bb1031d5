"""`--set section.key=value`: what the command line puts where a line of the file would have put it."""

import re
from typing import Any

from phased_cpt.config.allowed import nearest
from phased_cpt.config.inherit import OVERRIDABLE
from phased_cpt.config.read import COMMAND_LINE, Keys, Written, as_index, dotted, places_in, read_value
from phased_cpt.config.schema import default_phases
from phased_cpt.errors import InputError, Problem


def override(written: Written, text: str) -> list[tuple[Keys, Problem]]:
    """Apply one override; what is wrong with it is returned, and then nothing is changed."""
    address, equals, value_text = text.partition("=")
    if not equals or not address.strip():
        wanted = "section.key=value, such as training.learning_rate=5e-5"
        return [((), Problem("", f"given {text!r}; allowed: {wanted}", COMMAND_LINE))]
    try:
        value = read_value(value_text)
        parts = re.sub(r"\[(\d+)\]", r".\1", address.strip()).split(".")  # phases[0] is phases.0
        keys = _put(written.values, _address(parts, written.values), value)
    except InputError as error:
        return [((), Problem(address, str(error).removeprefix(f"{COMMAND_LINE}:1: "), COMMAND_LINE))]
    if not isinstance(value, dict):
        for stale in [place for place in written.places if place[: len(keys)] == keys]:
            del written.places[stale]
    written.places.update(dict.fromkeys([_whole_value(keys), *places_in(value, keys)], COMMAND_LINE))
    for above in (keys[:depth] for depth in range(1, len(keys))):
        written.places.setdefault(above, COMMAND_LINE)
    return []


def _address(parts: list[str], values: dict[str, Any]) -> list[str]:
    """A dotted address with its phase as an index; a phase is called by its name or its index (0 is the first)."""
    if parts[0] != "phases" and parts[0] in _phase_names(values):
        raise InputError(f"a phase is called phases.{parts[0]}; did you mean phases.{'.'.join(parts)}?")
    if parts[0] != "phases" or len(parts) == 1:
        return parts
    if values.get("phases") is None:  # the phases that hold by default can be overridden too
        values["phases"] = [phase.model_dump(mode="json", exclude_unset=True) for phase in default_phases()]
    names = _phase_names(values)
    if parts[1] in names:
        return ["phases", str(names.index(parts[1])), *parts[2:]]
    if (index := as_index(parts[1])) is not None and index < len(names):
        return parts
    hint = nearest(parts[1], names)
    raise InputError(f"no phase {parts[1]!r}{hint} (phases: {', '.join(names)}, or 0 to {len(names) - 1})")


def _phase_names(values: dict[str, Any]) -> list[str]:
    phases = values.get("phases")
    listed = phases if isinstance(phases, list) else []
    return [str(phase.get("name")) if isinstance(phase, dict) else "" for phase in listed]


def _put(values: dict[str, Any], parts: list[str], value: Any) -> Keys:
    """Set one value and return its keys; mappings that are not there yet are made, lists keep their length."""
    at: Any = values
    keys: Keys = ()
    for part in parts[:-1]:
        key = _key_in(at, part, keys)
        if isinstance(at, dict) and at.get(key) is None:
            at[key] = {}
        at, keys = at[key], (*keys, key)
    last = _key_in(at, parts[-1], keys)
    keys = (*keys, last)
    is_section = len(keys) < len(_whole_value((*keys, "", "", "")))
    at[last] = _laid_over(at.get(last), value) if is_section and isinstance(at, dict) else value
    return keys


def _laid_over(old: Any, new: Any) -> Any:
    """A section that is set keeps the keys that are not spoken of."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _laid_over(old.get(key), value) for key, value in new.items()}
    return new


def _key_in(at: Any, part: str, above: Keys) -> str | int:
    """What a part of an address means there: a key of a mapping, an index of a list, or nothing."""
    if isinstance(at, dict):
        return part
    if not isinstance(at, list):
        raise InputError(f"{dotted(above)} is a single value and has no {part}; set {dotted(above)} itself")
    if (index := as_index(part)) is not None and index < len(at):
        return index
    raise InputError(f"{dotted(above)} is a list of {len(at)} and has no {part}; the first is 0")


def _whole_value(keys: Keys) -> Keys:
    """The value that a deeper address changes: all of `data.where` came from the command line if a part of it did."""
    if keys[0] == "phases":
        return keys[: 4 if len(keys) > 2 and keys[2] in OVERRIDABLE else 3]
    return keys[: 3 if keys[0] == "tracking" else 2]
