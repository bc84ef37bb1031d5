"""Writes docs/configuration.md from the schema (`make schema`); `make check` holds it to that, nobody edits it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from phased_cpt.config import Phase, RunConfig, Source
from phased_cpt.config.allowed import allowed
from phased_cpt.config.read import Keys, dotted
from phased_cpt.config.rules import RULES
from phased_cpt.config.schema import Section

PAGE = Path(__file__).resolve().parents[1] / "docs/configuration.md"

HEAD = """\
# Configuration

Every key of a run's YAML or JSON. Made from `phased_cpt/config/schema.py` by `make schema`.

*A change* says what happens when the value is changed under a phase that has begun: a **recipe** is refused (it moves
the result), **execution** goes on and is recorded as inexact, **bookkeeping** is free. Phases may have values of their
own for every key of `lora` (where they start a fresh adapter), `data`, `training` and `evaluation`.

Numbers may be written `1e-4` or `1_000`, sizes `2GB` or `1.5GiB`, switches `true` or `yes`. `--set section.key=value`
overrides any of them; a phase is called by its name or by its index, the first being 0.
"""


COLUMNS = "| key | default | allowed | what it is | a change |\n|---|---|---|---|---|"


def page() -> str:
    """The whole page: the sections of the run, then what a phase and a source hold."""
    lists = [("phases[]", Phase, ("phases", 0)), ("phases[].sources[]", Source, ("phases", 0, "sources", 0))]
    rows = [row for title, section, keys in [*_sections(RunConfig, ()), *lists] for row in _table(title, section, keys)]
    return "\n".join([HEAD, *rows, "## Rules across keys\n", *_rules(), ""])


def _rules() -> Iterator[str]:
    yield "A rule that is broken is told with the values that it compares and what would mend it.\n"
    for rule in RULES:
        compared = ", ".join(f"`{name}`" for name in rule.compares)
        yield f"- {rule.check.__name__.replace('_', ' ')}: {compared}"


def _sections(section: type[Section], above: Keys) -> Iterator[tuple[str, type[Section], Keys]]:
    for name, field in section.model_fields.items():
        if _is_section(field):
            inner: type[Section] = field.annotation  # type: ignore[assignment]
            yield dotted((*above, name)), inner, (*above, name)
            yield from _sections(inner, (*above, name))


def _table(title: str, section: type[Section], keys: Keys) -> Iterator[str]:
    own = {name: field for name, field in section.model_fields.items() if not _is_section(field)}
    if own:
        yield f"## {title}\n\n{section.__doc__}\n\n{COLUMNS}"
        yield from (_row(name, field, (*keys, name)) for name, field in own.items())
        yield ""


def _row(name: str, field: FieldInfo, keys: Keys) -> str:
    extra = field.json_schema_extra
    default = "" if field.is_required() else f"`{json.dumps(_as_written(field.default, allowed(keys)))}`"
    words = allowed(keys) if len(allowed(keys)) < 120 else "a mapping with the keys of that section"
    sentence = str(field.description).replace("|", "\\|").replace("<", "&lt;")
    kind = extra["change"] if isinstance(extra, dict) else ""
    return f"| `{name}` | {default} | {words} | {sentence} | {kind} |"


def _as_written(value: object, words: str) -> object:
    """A size as people write it: 2GB, 256MiB."""
    if not isinstance(value, int) or not words.startswith("a size"):
        return value
    units = [("GB", 10**9), ("GiB", 2**30), ("MB", 10**6), ("MiB", 2**20)]
    return next(f"{value // size}{unit}" for unit, size in units if value % size == 0)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if PAGE.read_text() == page() else f"{PAGE} is not what the schema says: run `make schema`")
    PAGE.write_text(page())
