"""What may stand at a place of the configuration, in words, from the schema itself."""

import difflib
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from phased_cpt.config.read import Keys
from phased_cpt.config.schema import PHASE_NAME, RUN_NAME, RunConfig

_PATTERNS = {
    RUN_NAME: "letters, digits, dots, dashes and underscores, at most 64, the first a letter or a digit",
    PHASE_NAME: "letters, digits, dashes and underscores, at most 64, the first a letter or a digit, not all digits",
}


@cache
def schema() -> dict[str, Any]:
    """JSON Schema of a configuration file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | RunConfig.model_json_schema()


def node_at(keys: Keys) -> dict[str, Any]:
    """The part of the schema that speaks of one place; empty where there is none."""
    node = schema()
    for key in keys:
        node = next((found for option in _options(node) if (found := _child(option, key))), {})
    return node


def keys_at(keys: Keys) -> list[str]:
    """The keys that a mapping at this place may have."""
    return [name for option in _options(node_at(keys)) for name in option.get("properties", {})]


def allowed(keys: Keys) -> str:
    """What may stand here, as one would say it; where a list may stand, its only item may stand for it unsaid."""
    options = _options(node_at(keys))
    items = [item for option in options if option.get("type") == "array" for item in _options(option["items"])]
    return " or ".join(dict.fromkeys(_words(option) for option in options if option not in items))


def nearest(given: object, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(given).lower(), lowered, n=1, cutoff=0.6)
    return f"; did you mean {lowered[close[0]]}?" if close else ""


def choices_at(keys: Keys) -> list[str]:
    """The words that may stand here, where there is a choice of words."""
    return [
        word
        for option in _options(node_at(keys))
        for word in option.get("enum", [option.get("const")])
        if word is not None
    ]


def takes_text(keys: Keys, text: str) -> bool:
    options = [option for option in _options(node_at(keys)) if option.get("type") == "string" and "enum" not in option]
    return any(re.search(option.get("pattern", ""), text) for option in options)


def _options(node: dict[str, Any]) -> list[dict[str, Any]]:
    """A node as its alternatives, with references followed."""
    if "$ref" in node:
        return _options(schema()["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return [option for choice in node["anyOf"] for option in _options(choice)]
    return [node]


def _child(node: dict[str, Any], key: str | int) -> dict[str, Any] | None:
    if isinstance(key, int):
        return node.get("items")
    other = node.get("additionalProperties")
    return node.get("properties", {}).get(key) or (other if isinstance(other, dict) else None)


def _words(node: dict[str, Any]) -> str:
    if "enum" in node:
        return "one of " + ", ".join(node["enum"])
    if "const" in node:
        return str(node["const"])
    if "examples" in node:
        return f"a size such as {node['examples'][0]}"
    if node.get("pattern") in _PATTERNS:
        return _PATTERNS[node["pattern"]]
    match node.get("type"):
        case "array":
            return f"a list of {_plural(node.get('items', {}))}"
        case "object":
            keys = ", ".join(node.get("properties", {}))
            return f"a mapping with the keys {keys}" if keys else "a mapping"
        case "integer" | "number" as kind:
            return ("a whole number" if kind == "integer" else "a number") + _bounds(node)
        case kind:
            return {"boolean": "true or false", "null": "null", "string": "a text"}.get(str(kind), "a value")


def _plural(items: dict[str, Any]) -> str:
    return " or ".join(
        {"string": "texts", "object": "mappings with the keys " + ", ".join(option.get("properties", {}))}.get(
            option.get("type", ""), "values"
        )
        for option in _options(items)
    )


def _bounds(node: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {_number(node[key])}" for key, sign in signs.items() if key in node]
    return f" {' and '.join(found)}" if found else ""


def _number(limit: float) -> str:
    return f"{limit:,.0f}" if limit >= 1e6 else f"{limit:g}"
