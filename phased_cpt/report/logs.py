"""Logs of any length, read in bounded time.

small   ████████████████████   every line
large   █───█───█───█───█──█   windows, evenly over the file; the first line and the last are always among them
"""

import json
import math
import os
from datetime import datetime
from pathlib import Path
from typing import Any

WINDOWS, WINDOW_BYTES = 512, 4096  # 2 MB, some 8,000 lines: a tenth of a second of JSON
LAST_BYTES = 16_384  # many lines; no line of ours is longer

Line = dict[str, Any]


def lines_of(path: Path) -> list[Line]:
    """The lines of a log by their steps; what a kill tore, and what is no line of ours, is left out."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= WINDOWS * WINDOW_BYTES:
                return _parsed(file.read().split(b"\n"))
            starts = (at * (size - WINDOW_BYTES) // (WINDOWS - 1) for at in range(WINDOWS))
            return _parsed([raw for start in starts for raw in _window(file.fileno(), start)])
    except OSError:
        return []


def last_line(path: Path) -> Line | None:
    """The newest line of a log that is being written."""
    try:
        with path.open("rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - LAST_BYTES)
            found = _parsed(_window(file.fileno(), start, LAST_BYTES))
            return found[-1] if found else None
    except OSError:
        return None


def number(value: Any) -> float | None:
    """What can be drawn: a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def moment(text: Any) -> float | None:
    """Seconds since 1970, of a time as logs and ledger write it."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _window(file: int, start: int, size: int = WINDOW_BYTES) -> list[bytes]:
    """Whole lines only: what stands before the first line break and after the last is half of one."""
    lines = os.pread(file, size, start).split(b"\n")
    return lines[1 if start else 0 :]


def _parsed(raws: list[bytes]) -> list[Line]:
    found = []
    for raw in raws:
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and number(line.get("step")) is not None:
            found.append(line)
    return sorted(found, key=lambda line: float(line["step"]))
