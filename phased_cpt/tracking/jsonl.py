"""The exact record of a phase: one line a step in train.jsonl, one an evaluation in eval.jsonl, each step once."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phased_cpt.run_dir import publish_file
from phased_cpt.tracking.sink import Line, Stretch

FILES = ("train.jsonl", "eval.jsonl")


class Jsonl:
    """Lines are whole in the file when a call returns: a kill loses none that was given."""

    def __init__(self, stretch: Stretch) -> None:
        logs = stretch.logs
        logs.mkdir(parents=True, exist_ok=True)
        set_replayed_aside(logs, stretch.begin, stretch.attempt)
        self._train, self._evaluations = ((logs / name).open("ab") for name in FILES)

    def train(self, line: Line) -> None:
        self._train.write(as_json(line))
        self._train.flush()

    def evaluated(self, line: Line) -> None:
        self._evaluations.write(as_json(line))
        self._evaluations.flush()

    def tell(self, message: str) -> bool:
        return False

    def close(self) -> None:
        try:
            self._train.close()
        finally:
            self._evaluations.close()


def as_json(line: Line) -> bytes:
    return json.dumps(_plain(line), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """NaN and infinity are no JSON, though Python writes them: null."""
    if hasattr(value, "item"):  # a number of numpy
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def set_replayed_aside(logs: Path, begin: int, attempt: int) -> None:
    """Take out the steps that this attempt does again, all of them at a fresh start, and what a kill tore."""
    for name in FILES:
        path = logs / name
        before = path.read_bytes() if path.exists() else b""
        records = list(_records(before))
        kept = b"".join(raw for step, raw in records if begin > 0 and step <= begin)
        replayed = b"".join(raw for step, raw in records if begin == 0 or step > begin)
        # In this order a kill in between leaves a line in both, and never in neither.
        _append(logs / f"replayed-{attempt}.jsonl", replayed)
        if kept != before:
            publish_file(path, kept)


def _records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Each line with its step; a line that is no JSON was torn by a kill, and nothing can be read from it."""
    for raw in content.split(b"\n"):
        try:
            yield int(json.loads(raw)["step"]), raw + b"\n"
        except (ValueError, TypeError, KeyError):
            continue


def _append(path: Path, content: bytes) -> None:
    if not content:
        return
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
