"""Curated questions: JSON lines with a prompt, and one accepted answer or several."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phased_cpt.data.files import find_files, pieces_of
from phased_cpt.data.records import Bad, kind, records
from phased_cpt.errors import InputError

MAX_LINE_BYTES = 2**24
SHOWN = 20  # problems of a file

EXAMPLE = '{"prompt": "2 + 2 =", "answer": "4"}'


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right."""

    where: str  # questions.jsonl:3
    prompt: str
    answers: tuple[str, ...]


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Those of a file; every problem of it is told at once."""
    files = find_files(str(path))
    if len(files) != 1 or files[0].format != "json lines":
        raise InputError(f"--questions {path}: one file of JSON lines is needed, such as {EXAMPLE}")
    found, problems = [], []
    for each in _read(files[0].path):
        if isinstance(each, Question):
            found.append(each)
        else:
            problems.append(each)
    if problems:
        more = f"\nand {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError("\n".join(problems[:SHOWN]) + more)
    if not found:
        raise InputError(f"{path}: no question in it; a line is one, such as {EXAMPLE}")
    return found[:limit]


def _read(path: Path) -> Iterator[Question | str]:
    """Each question, or what is wrong with its line."""
    files, line = find_files(str(path)), 0
    for piece in pieces_of(files, MAX_LINE_BYTES):
        before = line
        for record in records(files, piece, MAX_LINE_BYTES, ()):
            line = before + record.line
            where = f"{path}:{line}"
            if isinstance(record, Bad):
                yield f"{where}: {record.reason}"
            elif record.fields is not None:
                yield _question(where, record.fields)


def _question(where: str, fields: dict[str, Any]) -> Question | str:
    prompt, answer = fields.get("prompt"), fields.get("answer")
    if not _is_text(prompt):
        return f"{where}: prompt: {_found(fields, 'prompt')}; needed is a text"
    answers: list[Any] = answer if isinstance(answer, list) else [answer]
    if not answers or not all(_is_text(each) for each in answers):
        return f"{where}: answer: {_found(fields, 'answer')}; needed is a text, or a list of those that are right"
    return Question(where, str(prompt), tuple(answers))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _found(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        return "missing"
    value = fields[key]
    if isinstance(value, list):
        wrong = next((each for each in value if not _is_text(each)), None)
        return f"a list with {_of(wrong)} in it" if value else "an empty list"
    return _of(value)


def _of(value: Any) -> str:
    return "an empty text" if isinstance(value, str) else f"a JSON {kind(value)}"
