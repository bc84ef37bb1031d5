"""Token stores: a source as flat ids on disk, made once by several processes, the same bytes for any number of them.

ids.bin        uint16 or uint32     d0 d0 d0 EOS d1 d1 EOS d2 …
offsets.npy    where each document begins, and the end
digests.npy    64 bits of the sha256 of each document's text, for the split and for duplicates
said.bin       of each id whether the assistant says it: only with data.assistant_only_loss
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.backends import Backends, Differs
from phased_cpt.data.bin import meta_file
from phased_cpt.data.cache import Facts, file_digests, key_of, make_once, stamp
from phased_cpt.data.chunks import Integers, Mask
from phased_cpt.data.documents import PROBLEMS_SHOWN, Reading
from phased_cpt.data.mixing import Scores
from phased_cpt.data.piecework import Result, Source, Work, tokenised_pieces
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.data.watch import Watcher
from phased_cpt.errors import InputError, Problem

COUNTED = ("blank", "empty", "left_out", "without_field", "special_texts", "nul_texts")


@dataclass(frozen=True)
class TokenStore:
    """A source, tokenised. Opening it reads nothing but its facts."""

    name: str  # of its source, as the user wrote it
    folder: Path
    facts: Facts
    cached: bool
    seconds: float  # that it took now

    @property
    def ids(self) -> NDArray[Any]:
        return open_ids(self.folder, self.facts["dtype"])

    @property
    def said(self) -> Mask | None:
        return open_said(self.folder) if self.facts.get("said") else None

    @property
    def offsets(self) -> Integers:
        return np.load(self.folder / "offsets.npy", mmap_mode="r")  # type: ignore[no-any-return]

    @property
    def digests(self) -> Scores:
        return np.load(self.folder / "digests.npy", mmap_mode="r")  # type: ignore[no-any-return]


def open_ids(folder: Path, dtype: str) -> NDArray[Any]:
    """The ids as a plain array over the mapped file: numpy's own class for that costs microseconds an access."""
    file = folder / "ids.bin"
    return np.asarray(np.memmap(file, dtype, "r")) if file.stat().st_size else np.empty(0, dtype)


def open_said(folder: Path) -> Mask:
    """Of each id whether the assistant says it."""
    file = folder / "said.bin"
    return np.asarray(np.memmap(file, np.bool_, "r")) if file.stat().st_size else np.empty(0, bool)


@dataclass(frozen=True)
class Workshop:
    """What tokens are made with."""

    tokenizer: Tokenizer
    backends: Backends
    cache: Path
    workers: int
    watcher: Watcher
    seen: dict[str, Facts] = field(default_factory=dict)  # the stores that were looked at, by key


def token_store(source: Source, backend: str, shop: Workshop) -> TokenStore:
    """The tokens of a source, from the cache or made now."""
    started = time.monotonic()
    paths = [file.path.resolve() for file in source.files]
    paths += [meta_file(path) for path in paths if path.suffix == ".bin" and meta_file(path).exists()]
    stamps = [stamp(path) for path in paths]  # before anything is read, so that no change goes unseen
    memory = shop.cache / "sources" / f"{key_of(*map(str, paths))}.json"
    contents = [[file.format for file in source.files], file_digests(paths, memory)]
    key = key_of("tokens", contents, source.rendering.key, source.max_line_bytes, shop.tokenizer.digest)

    def require_unchanged() -> None:
        if [stamp(path) for path in paths] != stamps:
            raise InputError(f"{source.name}: the data were changed while they were read; run the command again")

    def build(beside: Path) -> Facts:
        facts = _built(beside, source, backend, shop)
        require_unchanged()
        return facts | {"digest": key_of(contents)}

    facts, cached = shop.seen.get(key), True  # by an earlier phase: its bytes need no second look
    if facts is None:
        facts, cached = make_once(shop.cache / "tokens" / key, build, shop.watcher.tell)
        require_unchanged()
        shop.seen[key] = facts
    facts = facts | {"problems": told_problems(source, facts["problems"])}
    _judge(source, facts)
    return TokenStore(source.name, shop.cache / "tokens" / key, facts, cached, time.monotonic() - started)


def _built(beside: Path, source: Source, wanted: str, shop: Workshop) -> Facts:
    """With the fast backend; from the beginning with the reference, if that one gives other ids."""
    backend = shop.backends.named(wanted)
    try:
        return _tokenised(beside, Work(source, shop.tokenizer, backend), shop)
    except Differs as difference:
        backend = shop.backends.refuse(backend, str(difference))
        return _tokenised(beside, Work(source, shop.tokenizer, backend), shop)


# All pieces, shared out ----------------------------------------------------------------------------------------------


def _tokenised(beside: Path, work: Work, shop: Workshop) -> Facts:
    """Every piece in order, whoever has done it."""
    total, slow, lengths, digests = Reading(), 0, [np.empty(0, np.int64)], []
    numbers = LineNumbers(work.source)
    with contextlib.ExitStack() as files:
        file = files.enter_context((beside / "ids.bin").open("wb"))
        said = files.enter_context((beside / "said.bin").open("wb")) if work.source.rendering.assistant_only else None
        for result in tokenised_pieces(work, shop.workers, beside):
            file.write(result.ids)  # type: ignore[arg-type] # unlike its own tofile, this says that a disk is full
            if said is not None and result.said is not None:
                said.write(result.said)  # type: ignore[arg-type]
            lengths.append(result.lengths)
            digests.append(result.digests)
            slow += result.slow_documents
            numbers.add(result, total)
            if result.proof is not None:
                work.backend.proof.add(result.proof)
                shop.backends.keep(work.backend)
            shop.watcher.advance(result.piece.weight)
    numbers.close(total)
    if total.bad and not work.source.skip_bad:
        raise _bad_records(work.source, total.bad, total.documents, told_problems(work.source, numbers.problems))
    offsets = np.append(0, np.cumsum(np.concatenate(lengths)))
    np.save(beside / "offsets.npy", offsets)
    np.save(beside / "digests.npy", np.frombuffer(b"".join(digests), "<u8"))
    return {
        "files": len(work.source.files),
        "documents": len(offsets) - 1,
        "tokens": int(offsets[-1]),
        "dtype": work.tokenizer.dtype,
        "bytes": sum(file.path.stat().st_size for file in work.source.files),
        "backend": work.backend.name,
        "slow_documents": slow,
        "bad": total.bad,
        "problems": numbers.problems,
        **{name: total.counts[name] for name in COUNTED},
        **({"said": True, "silent": total.counts["silent"]} if work.source.rendering.assistant_only else {}),
    }


class LineNumbers:
    """Problems know their line in a piece; here they get the one in the file. An empty file is a problem, too."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[list[int | str]] = []  # index of the file, line (0: all of it), field, reason
        self._file, self._lines, self._records = 0, 0, 0

    def add(self, result: Result, total: Reading) -> None:
        while self._file != result.piece.file:
            self.close(total)
        for bad in result.reading.problems:
            if self.source.files[self._file].format == "text":  # there, a line of a piece is a file
                self._show(self._file + bad.line - 1, 0, bad.field, bad.reason)
            else:
                self._show(self._file, self._lines + bad.line, bad.field, bad.reason)
        reading = result.reading
        self._lines += reading.lines
        self._records += reading.documents + reading.bad + reading.counts["empty"] + reading.counts["left_out"]
        self._file += result.piece.files - 1
        total.bad += reading.bad
        total.documents += reading.documents
        total.counts.update(reading.counts)

    def close(self, total: Reading) -> None:
        """The file is at its end."""
        if not self._records:
            total.bad += 1
            self._show(self._file, 0, "", "0 records; the file is empty")
        self._file, self._lines, self._records = self._file + 1, 0, 0

    def _show(self, *problem: int | str) -> None:
        if len(self.problems) < PROBLEMS_SHOWN:
            self.problems.append(list(problem))


def told_problems(source: Source, problems: Sequence[Sequence[Any]]) -> list[str]:
    """By the names that the files have today: what is wrong with them may have been found under others."""
    places = [f"{source.files[at].path}" + (f":{line}" if line else "") for at, line, *_ in problems]
    return [str(Problem(field, why, place)) for place, (_, _, field, why) in zip(places, problems, strict=True)]


# What is not good enough ---------------------------------------------------------------------------------------------


def _judge(source: Source, facts: Facts) -> None:
    """Too many bad records, or no document at all: also where the tokens were there already."""
    documents, bad = facts["documents"], facts["bad"]
    if bad and (not source.skip_bad or bad > source.max_bad_share * (bad + documents)):
        raise _bad_records(source, bad, documents, facts["problems"])
    if not documents:
        told = {
            "empty": "empty",
            "left_out": "left out by data.where",
            "without_field": "of these without such a field",
            "blank": "blank lines",
        }
        counts = ", ".join(f"{facts[name]} {what}" for name, what in told.items() if facts[name]) or "nothing in it"
        raise InputError(f"{source.name}: no document is left to train on ({counts})")


def _bad_records(source: Source, bad: int, documents: int, problems: list[str]) -> InputError:
    shown = "\n".join(problems)
    more = f"\n… and {bad - len(problems)} more" if bad > len(problems) else ""
    count = f"{bad} bad record{'s' * (bad != 1)} in {source.name}"
    share = bad / (bad + documents)
    if not documents:
        end = f"{count}, and no good one"
    elif source.skip_bad:
        end = f"{count}: {share:.1%}, more than data.max_bad_share {source.max_bad_share:g}; mend them, or raise it"
    else:
        end = f"{count}, and {documents:,} good; mend them, or leave them out: data.on_bad_record: skip"
    return InputError(f"{shown}{more}\n{end}")
