"""The documents of a piece, and what was found that is none. Runs in the workers.

file ─ records ─ where ─ render ─┬ documents
                                 ├ blank lines, empty texts, what `where` leaves out   counted
                                 └ bad records                                         line, field, reason
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

from phased_cpt.data.files import File, Piece
from phased_cpt.data.records import Bad, BadRecord, Fields, records
from phased_cpt.data.render import Document, Rendering, render
from phased_cpt.data.tokenizer import Tokenizer

PROBLEMS_SHOWN = 20
DIGEST_BYTES = 8  # among 100 million documents, 3 in 10,000 chances that two are taken for one


class Found(NamedTuple):
    """A document, and the digest of its text before it was rendered."""

    document: Document
    digest: bytes


@dataclass
class Reading:
    """What reading has counted; readings of pieces add up."""

    lines: int = 0
    bad: int = 0
    documents: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # what is no document: KINDS; and kinds of documents
    problems: list[Bad] = field(default_factory=list)  # the first few


def read_documents(
    files: Sequence[File],
    piece: Piece,
    rendering: Rendering,
    max_line_bytes: int,
    tokenizer: Tokenizer,
    reading: Reading,
) -> Iterator[Found]:
    """The documents of a piece in order, counting into `reading`."""
    if files[piece.file].format == "text":
        rendering = rendering._replace(text_field="text")  # it has no other
    for record in records(files, piece, max_line_bytes, rendering.columns):
        reading.lines = record.line
        if isinstance(record, Bad):
            _count_bad(record, reading)
        elif record.fields is None:
            reading.counts["blank"] += 1
        elif not rendering.keeps(record.fields):
            reading.counts["left_out"] += 1
            reading.counts["without_field"] += not rendering.where.keys() <= record.fields.keys()
        else:
            try:
                found = _document(record.fields, rendering, tokenizer)
            except BadRecord as bad:
                _count_bad(Bad(record.line, bad.field, bad.reason), reading)
                continue
            if found is None:
                reading.counts["empty"] += 1
                continue
            reading.documents += 1
            reading.counts["nul_texts"] += "\0" in found.document.identity
            reading.counts["special_texts"] += _quotes_specials(found.document, tokenizer)
            yield found


def _document(fields: Fields, rendering: Rendering, tokenizer: Tokenizer) -> Found | None:
    try:
        document = render(fields, rendering, tokenizer)
        if document is None:
            return None
        if document.parts[0].text is not document.identity:
            "".join(part.text for part in document.parts).encode()
        return Found(document, sha256(document.identity.encode()).digest()[:DIGEST_BYTES])
    except UnicodeEncodeError as error:
        raise BadRecord("", f"half a character (a lone surrogate) at character {error.start + 1} of the text") from None
    except RecursionError:
        raise BadRecord("", "nested too deep") from None


def _quotes_specials(document: Document, tokenizer: Tokenizer) -> bool:
    """Whether it holds the text of a special token, which stays text."""
    return any(not part.special and tokenizer.special_in(part.text) for part in document.parts)


def _count_bad(bad: Bad, reading: Reading) -> None:
    reading.bad += 1
    if len(reading.problems) < PROBLEMS_SHOWN:
        reading.problems.append(bad)
