"""A piece of a file becomes records; what cannot be read is told by line, field and reason.

Strict on purpose: loaders in use take a missing field for None, 2024-01-01 for a date, and the second of two keys.
"""

import io
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from phased_cpt.data.files import File, Piece, parquet_file
from phased_cpt.errors import InputError

BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
SKIP_BYTES = 2**20  # how much of an overlong line is passed over at once

LINES_OF_ARRAY = "jq -c '.[]' array.json > lines.jsonl makes lines of an array"

Fields = dict[str, Any]


class BadRecord(Exception):  # noqa: N818 - a record, not an error of the program
    """A record that cannot be used."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(reason)


class Record(NamedTuple):
    """One record, and its line (or row, or 1 for a whole file) in the piece; blank lines hold none."""

    line: int
    fields: Fields | None


@dataclass
class Bad:
    """Where a record is bad, and why."""

    line: int
    field: str
    reason: str


def records(
    files: Sequence[File], piece: Piece, max_line_bytes: int, columns: Collection[str]
) -> Iterator[Record | Bad]:
    """What is in a piece, in order; of Parquet only the columns that are needed. Of texts, the line is the file."""
    file = files[piece.file]
    if file.format == "json lines":
        yield from _json_records(file, piece, max_line_bytes)
    elif file.format == "parquet":
        for line, fields in enumerate(_rows(file, piece, columns), 1):
            yield Record(line, fields)
    else:
        for number, text in enumerate(files[piece.file : piece.file + piece.files], 1):
            yield _text(number, text, piece, max_line_bytes)


# JSON lines ----------------------------------------------------------------------------------------------------------


def _json_records(file: File, piece: Piece, max_line_bytes: int) -> Iterator[Record | Bad]:
    for number, line in enumerate(lines(file, piece, max_line_bytes), 1):
        try:
            if len(line) > max_line_bytes:
                raise BadRecord("", f"longer than data.max_line_bytes ({max_line_bytes} bytes)")
            yield Record(number, _object(line, first=piece.start == 0 and number == 1))
        except BadRecord as bad:
            cut_off = not line.endswith(b"\n") and bad.reason.startswith("invalid")
            yield Bad(number, bad.field, bad.reason + ("; the file may be incomplete" if cut_off else ""))


def lines(file: File, piece: Piece, max_line_bytes: int) -> Iterator[bytes]:
    """The lines that begin in a piece; of one that is too long, only its beginning."""
    if piece.content is not None:
        yield from _lines(io.BytesIO(piece.content), 0, len(piece.content), max_line_bytes)
        return
    with file.path.open("rb") as stream:
        begin = _next_line(stream, piece)
        yield from _lines(stream, begin, piece.end, max_line_bytes)


def _next_line(stream: IO[bytes], piece: Piece) -> int:
    """Where the first line begins that begins in the piece (or its end)."""
    at = piece.start
    if at == 0:
        return 0
    stream.seek(at - 1)
    at -= 1
    while at < piece.end and (part := stream.readline(SKIP_BYTES)):
        at += len(part)
        if part.endswith(b"\n"):
            break
    return at


def _lines(stream: IO[bytes], at: int, end: int, max_line_bytes: int) -> Iterator[bytes]:
    while at < end and (line := stream.readline(max_line_bytes + 1)):
        yield line
        at += len(line)
        too_long = len(line) > max_line_bytes
        while too_long and not line.endswith(b"\n") and at < end and (line := stream.readline(SKIP_BYTES)):
            at += len(line)


def _object(line: bytes, first: bool) -> Fields | None:
    """The JSON object of a line; None if it is blank."""
    if first:
        line = _without_bom(line)
    if not line.strip():
        return None
    try:
        value = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise BadRecord("", f"invalid UTF-8 at byte {error.start} of the line") from None
    except _Unwanted as error:
        raise BadRecord("", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("", _why(line, error)) from None
    if not isinstance(value, dict):
        mend = f" ({LINES_OF_ARRAY})" if isinstance(value, list) else ""
        raise BadRecord("", f"a JSON {kind(value)}; needed is one object per line{mend}")
    return value


def _without_bom(line: bytes) -> bytes:
    for bom, name in OTHER_BOMS.items():
        if line.startswith(bom):
            raise BadRecord("", f"the file is {name}; save it as UTF-8")
    return line.removeprefix(BOM)


def _why(line: bytes, error: Exception) -> str:
    if line.strip() in (b"{", b"[", b"[{"):
        return f"invalid JSON: one value over several lines; needed is one object per line ({LINES_OF_ARRAY})"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return "invalid JSON: nested too deep" if isinstance(error, RecursionError) else f"invalid JSON: {error}"


class _Unwanted(Exception):  # noqa: N818
    """JSON that can be read, and says two things, or no number."""


def _strictly(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise _Unwanted(f"the key {cut(repr(twice))} is given twice")
    return fields


def _no_number(name: str) -> Any:
    raise _Unwanted(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_strictly, parse_constant=_no_number)


def cut(text: str) -> str:
    """What a file holds, fit for a message: on one line, and not a page long."""
    short = text if len(text) <= 80 else f"{text[:77]}…"
    return "".join(letter if letter.isprintable() else "?" for letter in short)


def kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {str: "text", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


# Parquet and plain texts ---------------------------------------------------------------------------------------------


def _rows(file: File, piece: Piece, columns: Collection[str]) -> Iterator[Fields]:
    if piece.end:
        table = parquet_file(file.path)
        wanted = [name for name in table.schema_arrow.names if name in columns] or None
        try:
            for batch in table.iter_batches(batch_size=1024, row_groups=[piece.start], columns=wanted):
                yield from batch.to_pylist()
        except (OSError, ValueError, OverflowError) as error:  # what Arrow raises is one of these
            raise InputError(f"{file.path}: row group {piece.start + 1} cannot be read: {cut(str(error))}") from None


def _text(number: int, file: File, piece: Piece, max_line_bytes: int) -> Record | Bad:
    """A file of text is one document."""
    if piece.content is None and file.path.stat().st_size > max_line_bytes:
        return Bad(number, "", _too_long(max_line_bytes))
    raw = file.path.read_bytes() if piece.content is None else piece.content
    if len(raw) > max_line_bytes:
        return Bad(number, "", _too_long(max_line_bytes))
    try:
        return Record(number, {"text": _without_bom(raw).decode()})
    except UnicodeDecodeError as error:
        return Bad(number, "", f"invalid UTF-8 at byte {error.start}")
    except BadRecord as bad:
        return Bad(number, "", bad.reason)


def _too_long(max_line_bytes: int) -> str:
    return f"a text longer than data.max_line_bytes ({max_line_bytes} bytes); split it, or raise that"
