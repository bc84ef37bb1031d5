"""A YAML or JSON file becomes plain values, each with the line that it stands on.

PyYAML finds the structure; the meaning of a scalar is decided here, as YAML 1.2 has it: 1e-4 and 1_000 are numbers,
true and false are the only booleans, and `no`, 2026-11-20 or 1:30 stay text. (PyYAML reads YAML 1.1: 1e-4 is text.)
Nothing is constructed from tags, so a file can hold data and nothing else.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phased_cpt.errors import InputError, Problem

Keys = tuple[str | int, ...]

COMMAND_LINE = "--set"  # the place of what was not read from a file

MAX_BYTES = 2**22  # a configuration is written by hand; a data set given by mistake is not read into memory
MAX_VALUES = 100_000  # aliases are expanded while they are read: nine lines of them can stand for 10^9 values
MAX_DEPTH = 40

MAX_NUMBER = 2**63  # numbers beyond it overflow somewhere, long after the file was read

_PLAIN = "plain"  # the tag of an unquoted scalar without a tag
_STR, _MAP, _SEQ = (f"tag:yaml.org,2002:{name}" for name in ("str", "map", "seq"))
_WHOLE = re.compile(r"^[-+]?[0-9][0-9_]*$|^0x[0-9a-fA-F][0-9a-fA-F_]*$|^0o[0-7][0-7_]*$")
_REAL = re.compile(r"^[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*\.?[0-9_]*)(?:[eE][-+]?[0-9]+)?$")
_NAMED = {"": None, "~": None, "null": None, "true": True, "false": False} | {
    f"{sign}.{name}": float(f"{sign}{name}") for sign in ("", "+", "-") for name in ("inf", "nan")
}
# What a JSON string may hold raw, and YAML reads as blanks, line breaks or errors.
_JSON_AS_YAML = {0x09: " ", 0x2028: "\\u2028", 0x2029: "\\u2029", 0xFEFF: "\\ufeff"} | {
    code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)
}


@dataclass
class Written:
    """What a file says: plain values, the place of each, and what was wrong on the way."""

    values: dict[str, Any]
    places: dict[Keys, str] = field(default_factory=dict)
    problems: list[tuple[Keys, Problem]] = field(default_factory=list)


def read_file(path: Path) -> Written:
    """Read a configuration file, or say in one message why it cannot be read."""
    text = _text_of(path)
    if path.suffix.lower() == ".json":
        text = _json_as_yaml(text, path)
    root = _compose(text, str(path))
    if root is None:
        raise InputError(f"{path}: the file is empty; a run has at least `model: {{name: …}}` and a list of `phases`")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise InputError(
            f"{path}:1: {kind} stands at the top; sections such as `model:` and `phases:` are needed there"
        )
    walk = _Walk(str(path))
    values = walk.value(root, ())
    if not isinstance(values, dict):
        raise InputError("\n".join(str(problem) for _, problem in walk.problems))
    values.pop("$schema", None)  # how a JSON file names its schema to an editor
    return Written(values, walk.places, walk.problems)


def read_value(text: str) -> Any:
    """Read one value as it would be read in a file (for --set)."""
    node = _compose(text, COMMAND_LINE)
    walk = _Walk(COMMAND_LINE)
    value = None if node is None else walk.value(node, ())
    if isinstance(value, str) and re.search(r"\s#", text) and "#" not in value:
        raise InputError("a # behind a blank begins a comment in YAML; put the text in quotes")
    if walk.problems:
        raise InputError("; ".join(problem.message for _, problem in walk.problems))
    return value


def _text_of(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; name the YAML or JSON file in it")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (looked from {Path.cwd()})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes; a configuration is small, is this a data file?")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: the file is UTF-16; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _json_as_yaml(text: str, path: Path) -> str:
    """JSON is YAML but for a few characters; json vouches for the rest, YAML tells the lines."""
    if not text.strip():
        return ""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg.lower()} (column {error.colno})") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise InputError(f"{path}: not valid JSON: {error}") from None
    return text.translate(_JSON_AS_YAML)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise InputError(f"{where}: {_syntax(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{name}:{line}: the character U+{ord(text[error.position]):04X} is not allowed") from None
    except RecursionError:
        raise InputError(f"{name}: nested too deeply") from None
    except (ValueError, OverflowError) as error:  # PyYAML trips over \\U00110000 and over %YAML 1.99…9
        raise InputError(f"{name}: not valid YAML: {error}") from None


class _Loader(yaml.BaseLoader):
    """Finds the structure, and leaves the meaning of unquoted scalars to us (and tells them from tagged ones)."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


# What PyYAML says, and what would have helped.
_HINTS = (
    ("'\\t'", "a tab stands here; YAML is indented with blanks"),
    ("single document", "a second document begins here (`---`); one file holds one run"),
    ("mapping values are not allowed", "a colon where none can stand; is the line above indented alike, or does a text "
                                       "need quotes?"),
    ("while scanning an alias", "a * begins an alias in YAML; put the text in quotes"),
    ("cannot start any token", "a text cannot begin with this character; put it in quotes"),
    ("could not find expected ':'", "a key without a value; is there a blank behind the colon?"),
    ("expected <block end>", "this line does not fit the ones above; is it indented like its neighbours?"),
    ("scanning a quoted scalar", "a quote that is opened near here is not closed"),
)  # fmt: skip


def _syntax(error: yaml.MarkedYAMLError) -> str:
    words = " ".join(filter(None, (error.context, error.problem))) or "not valid YAML"
    return next((hint for sign, hint in _HINTS if sign in words), f"not valid YAML: {words}")


class _Walk:
    """Turns nodes into values, counts them, and remembers where each one stood."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Keys, str] = {}
        self.problems: list[tuple[Keys, Problem]] = []
        self._count = 0

    def value(self, node: yaml.Node, keys: Keys) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise InputError(f"{self.name}: more than {MAX_VALUES:,} values once its aliases are followed")
        if len(keys) > MAX_DEPTH:
            raise InputError(f"{self._place(node)}: nested deeper than {MAX_DEPTH} levels, or an alias of itself")
        self.places[keys] = self._place(node)
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
            return [self.value(item, (*keys, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in (_PLAIN, _STR):
            return self._scalar(node, keys)
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        self._problem(node, keys, f"given the tag {tag}; allowed: plain values, nothing is built from a tag")
        return None

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _whole(str(key_node.value))
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, keys, "given a list or a mapping as a key; allowed: a text")
            elif _is_merge(key_node):
                continue
            elif key in found:
                self._problem(key_node, (*keys, key), f"given twice; first at {self.places[(*keys, key)]}")
            else:
                found[key] = self.value(value_node, (*keys, key))
                self.places[(*keys, key)] = self._place(key_node)
        return self._inherited(node, keys) | found

    def _inherited(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        """What `<<: *alias` brings in; the mapping's own keys go before it."""
        inherited: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                many = isinstance(value_node, yaml.SequenceNode)
                for source in reversed(value_node.value if many else [value_node]):
                    value = self.value(source, (*keys, "<<"))
                    if not isinstance(value, dict):
                        self._problem(key_node, keys, "given << with something that is not a mapping")
                    else:
                        inherited |= value
        depth = len(keys)
        for place in [place for place in self.places if place[depth : depth + 1] == ("<<",)]:
            self.places.setdefault((*keys, *place[depth + 1 :]), self.places.pop(place))
        self.problems = [
            ((*keys, *place[depth + 1 :]) if place[depth : depth + 1] == ("<<",) else place, problem)
            for place, problem in self.problems
        ]
        return inherited

    def _scalar(self, node: yaml.ScalarNode, keys: Keys) -> Any:
        text = _whole(node.value)
        if "\x00" in text:
            self._problem(node, keys, "given a text with the character U+0000")
            return None
        try:
            value = plain_scalar(text) if node.tag == _PLAIN else text
        except ValueError:  # more digits than Python converts
            value = MAX_NUMBER + 1
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            self._problem(node, keys, "given a number of too many digits")
            return None
        return value

    def _problem(self, node: yaml.Node, keys: Keys, message: str) -> None:
        self.problems.append((keys, Problem(dotted(keys), message, self._place(node))))

    def _place(self, node: yaml.Node) -> str:
        return self.name if self.name == COMMAND_LINE else f"{self.name}:{node.start_mark.line + 1}"


def _is_merge(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.tag == _PLAIN


def _whole(text: str) -> str:
    """JSON writes a character beyond U+FFFF as two halves, which YAML leaves apart."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain_scalar(text: str) -> Any:
    """The value of an unquoted scalar, as YAML 1.2's core schema has it (and 1_000, as people write it)."""
    if text.lower() in _NAMED:
        return _NAMED[text.lower()]
    if _WHOLE.match(text):
        digits = text.replace("_", "")
        return int(digits, 0) if digits[:2] in ("0x", "0o") else int(digits)
    if _REAL.match(text):
        return float(text.replace("_", ""))
    return text


def places_in(value: Any, keys: Keys) -> Iterator[Keys]:
    """The place of every value in a tree of values."""
    yield keys
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places_in(child, (*keys, key))


def value_at(values: Any, keys: Keys) -> Any:
    """What stands at a place, None where nothing does."""
    for key in keys:
        if key not in (values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()):
            return None
        values = values[key]
    return values


def as_index(part: str) -> int | None:
    """A part of an address that counts; more digits than any list has are a text (and more than Python converts)."""
    return int(part) if part.isdecimal() and len(part) < 10 else None


def dotted(keys: Keys) -> str:
    """a.0.b, on one line whatever a key holds."""
    path = ".".join(map(str, keys))
    return path if path.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in path)
