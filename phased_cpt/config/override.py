"""`--set section.key=value`: what the command line puts where a line of the file would have put it."""

import re
from collections.abc import Iterator
from typing import Any

from phased_cpt.config.allowed import nearest
from phased_cpt.config.inherit import OVERRIDABLE
from phased_cpt.config.read import COMMAND_LINE, Keys, Written, as_index, dotted, places_in, read_value
from phased_cpt.config.schema import default_phases
from phased_cpt.errors import InputError, Problem


def override(written: Written, text: str) -> list[tuple[Keys, Problem]]:
    """Apply one override; what is wrong with it is returned, and then nothing is changed."""
    address, equals, value_text = text.partition("=")
    address = address.strip()
    if not equals or not re.fullmatch(r"[^\s{}]+", address):
        given = repr(text) if re.fullmatch(r"[\w.=-]*", text) else "something else"  # which may hold anything
        wanted = "section.key=value, such as training.learning_rate=5e-5"
        return [((), Problem("", f"given {given}; allowed: {wanted}", COMMAND_LINE))]
    try:
        parts = re.sub(r"\[(\d+)\]", r".\1", address).split(".")  # phases[0] is phases.0
        for whole, value in _whole_values(_address(parts, written.values), read_value(value_text)):
            _set(written, whole, value)
    except InputError as error:
        return [((), Problem(address, str(error).removeprefix(f"{COMMAND_LINE}:1: "), COMMAND_LINE))]
    return []


def _whole_values(parts: list[str], value: Any) -> Iterator[tuple[list[str], Any]]:
    """A section that is set is its keys, each set by itself: those that are not spoken of stay."""
    if isinstance(value, dict) and _is_section(parts):
        for key, child in value.items():
            yield from _whole_values([*parts, key], child)
    else:
        yield parts, value


def _is_section(parts: list[str]) -> bool:
    if parts[0] == "phases":
        return len(parts) == 2 or (len(parts) == 3 and parts[2] in OVERRIDABLE)
    return len(parts) == 1 or (parts[0] == "tracking" and len(parts) == 2)


def _set(written: Written, parts: list[str], value: Any) -> None:
    """Put a value, and note that it and all above it that was not there come from the command line."""
    keys = _put(written.values, parts, value)
    for stale in [place for place in written.places if place[: len(keys)] == keys]:
        del written.places[stale]
    whole = keys
    while len(whole) > 1 and not _is_section([str(key) for key in whole[:-1]]):
        whole = whole[:-1]  # all of `data.where` came from the command line if a part of it did
    written.places.update(dict.fromkeys([whole, *places_in(value, keys)], COMMAND_LINE))
    for above in (keys[:depth] for depth in range(1, len(keys))):
        written.places.setdefault(above, COMMAND_LINE)


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
    if not names:
        raise InputError("`phases` is not a list, so none of them can be called")
    hint = nearest(parts[1], names)
    raise InputError(f"no phase {parts[1]!r}{hint} (phases: {', '.join(names)}, or 0 to {len(names) - 1})")


def _phase_names(values: dict[str, Any]) -> list[str]:
    phases = values.get("phases")
    listed = phases if isinstance(phases, list) else []
    names = [phase.get("name") if isinstance(phase, dict) else None for phase in listed]
    return [name if isinstance(name, str) else "" for name in names]


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
    at[last] = value
    return (*keys, last)


def _key_in(at: Any, part: str, above: Keys) -> str | int:
    """What a part of an address means there: a key of a mapping, an index of a list, or nothing."""
    if isinstance(at, dict):
        return part
    if not isinstance(at, list):
        raise InputError(f"{dotted(above)} is a single value and has no {part}; set {dotted(above)} itself")
    if (index := as_index(part)) is not None and index < len(at):
        return index
    raise InputError(f"{dotted(above)} is a list of {len(at)} and has no {part}; the first is 0")
