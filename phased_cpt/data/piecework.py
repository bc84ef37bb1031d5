"""One piece of a source becomes tokens, and how several processes share the pieces out.

pieces ─┬─ worker 1 ─┐
        ├─ worker 2 ─┼─ results in the order of the pieces, whoever was faster
        └─ worker 3 ─┘
"""

import ctypes
import multiprocessing
import os
import pickle
import shutil
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.backends import Backend, Encoded, Ids, Proof, by_reference, interleaved
from phased_cpt.data.bin import read_bin
from phased_cpt.data.chunks import Integers, Mask, counted
from phased_cpt.data.documents import DIGEST_BYTES, Reading, read_documents
from phased_cpt.data.files import File, Piece, pieces_of
from phased_cpt.data.render import Document, Rendering
from phased_cpt.data.said import mask_of, with_frame
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.stopping import STOPS

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Source:
    """What one source names, and how it is to be read."""

    name: str  # as the user wrote it
    files: Sequence[File]
    rendering: Rendering
    max_line_bytes: int
    skip_bad: bool
    max_bad_share: float


class Result(NamedTuple):
    """A piece, tokenised."""

    piece: Piece
    ids: NDArray[Any]
    lengths: Integers
    digests: bytes
    reading: Reading
    slow_documents: int
    proof: Proof | None  # if something was proven anew
    said: Mask | None = None  # of each id whether the assistant says it, where that is asked for


class Work(NamedTuple):
    """What every worker is given once: what to read, and what to tokenise it with."""

    source: Source
    tokenizer: Tokenizer
    backend: Backend

    def tokenised(self, piece: Piece) -> Result:
        """Read a piece and tokenise it, its head by the reference too."""
        source, tokenizer, backend = self
        reading, file = Reading(), source.files[piece.file]
        if file.format == "tokens":
            if source.rendering.assistant_only:
                what = "tokens do not say who speaks, and data.assistant_only_loss trains what the assistant says"
                raise InputError(f"{file.path}: {what}; name the chats that they were made of, or take it out")
            return _copied(piece, file, tokenizer)
        found = list(read_documents(source.files, piece, source.rendering, source.max_line_bytes, tokenizer, reading))
        if reading.bad and not source.skip_bad:
            found = []  # nothing comes of it: only the other problems are looked for
        documents = [each.document for each in found]
        compared, backend.slow_documents = np.count_nonzero(backend.proof.compared), 0
        encoded, said = _encoded(documents, backend), None
        parsed = np.array([any(part.special for part in document.parts) for document in documents], bool)
        digests = b"".join(each.digest for each in found)
        news = backend.proof if np.count_nonzero(backend.proof.compared) != compared else None
        ids, lengths, is_text = _framed(encoded, parsed, tokenizer)
        if source.rendering.assistant_only:
            said = with_frame(mask_of(documents, encoded, tokenizer), is_text, lengths)
            reading.counts["silent"] = int((counted(said, np.cumsum(lengths) - lengths, lengths) == 0).sum())
        return Result(piece, ids, lengths, digests, reading, backend.slow_documents, news, said)


def _encoded(documents: list[Document], backend: Backend) -> Encoded:
    whole = {special: [] for special in (False, True)}  # type: dict[bool, list[int]]
    mixed: list[int] = []
    for at, document in enumerate(documents):
        (whole[document.parts[0].special] if len(document.parts) == 1 else mixed).append(at)
    encodings = []
    for special, places in whole.items():
        if texts := [documents[at].parts[0].text for at in places]:
            backend.prove_head(texts, special)
            encodings.append((places, backend.encode(texts, special)))
    encodings += [([at], _of_parts(documents[at], backend)) for at in mixed]
    return interleaved(len(documents), encodings)


def _of_parts(document: Document, backend: Backend) -> Encoded:
    """Special tokens as tokens in some parts and as text in others: part by part, by the reference."""
    parts = [by_reference(backend.tokenizer, [part.text], part.special).ids for part in document.parts]
    return Encoded(np.concatenate(parts), np.array([sum(map(len, parts))]))


def _framed(encoded: Encoded, may_be: NDArray[np.bool_], tokenizer: Tokenizer) -> tuple[Ids, Integers, Mask]:
    """Each document with the prefix and one EOS, unless it may bring them along, and does: rendered chats.

    And which of the ids are the document's own.
    """
    ids, lengths = encoded
    ends = np.cumsum(lengths)
    begins = ends - lengths
    prefix = np.array(tokenizer.prefix, np.uint32)
    has_prefix = may_be & (lengths >= len(prefix))
    for at, each in enumerate(prefix):
        has_prefix[has_prefix] = ids[begins[has_prefix] + at] == each
    has_end = may_be & (lengths > 0)
    has_end[has_end] = ids[ends[has_end] - 1] == tokenizer.eos_id
    bare, open_ = ~has_prefix, ~has_end
    framed_ends = np.cumsum(lengths + bare * len(prefix) + open_)
    framed_begins = framed_ends - lengths - bare * len(prefix) - open_
    places = [framed_begins[bare] + at for at in range(len(prefix))]
    ids_framed = np.empty(int(framed_ends[-1]) if len(lengths) else 0, tokenizer.dtype)
    is_text = np.ones(len(ids_framed), bool)
    is_text[np.concatenate([framed_ends[open_] - 1, *places])] = False
    ids_framed[is_text] = ids
    ids_framed[framed_ends[open_] - 1] = tokenizer.eos_id
    for place, each in zip(places, prefix, strict=True):
        ids_framed[place] = each
    return ids_framed, framed_ends - framed_begins, is_text


def _copied(piece: Piece, file: File, tokenizer: Tokenizer) -> Result:
    """A .bin file is tokens already."""
    ids, lengths = read_bin(file.path, tokenizer)
    ends = np.cumsum(lengths)
    each = (ids[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True))
    digests = b"".join(sha256(document.astype("<u4").tobytes()).digest()[:DIGEST_BYTES] for document in each)
    reading = Reading(lines=len(lengths), documents=len(lengths))
    return Result(piece, ids.astype(tokenizer.dtype, copy=False), lengths, digests, reading, 0, None)


# Shared out ----------------------------------------------------------------------------------------------------------


def tokenised_pieces(work: Work, workers: int, beside: Path) -> Iterator[Result]:
    """The pieces of a source, tokenised, in order; only a few more than there are workers are held at a time.

    Always in workers: the fast libraries start threads at their first text, and a process that has some cannot be
    forked any more without a deadlock. They hand their results over as files: one that is killed in the middle of a
    large message would block all who read from the same pipe.
    """
    pieces = pieces_of(work.source.files, work.source.max_line_bytes)
    context = multiprocessing.get_context("fork")  # what is loaded is theirs, too: nothing is loaded twice
    parts = beside / "parts"
    parts.mkdir(mode=0o700)
    try:
        with ProcessPoolExecutor(workers, context, _become_worker, (work, parts, os.getpid())) as pool:
            try:
                yield from _in_order(work, pieces, pool, at_once=2 * workers)
            except BrokenProcessPool:
                what = "a worker that tokenises was killed; if memory was short, try --workers 1"
                raise PhasedCptError(what) from None
            except BaseException:
                for worker in list((pool._processes or {}).values()):
                    worker.kill()  # nobody wants what it is at
                raise
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def _in_order(work: Work, pieces: Iterator[Piece], pool: ProcessPoolExecutor, at_once: int) -> Iterator[Result]:
    waiting: deque[Future[Path]] = deque()
    for number, piece in enumerate(pieces):
        if work.source.files[piece.file].format == "tokens":  # nothing to share out: they are copied
            yield from map(_received, waiting)
            waiting.clear()
            yield work.tokenised(piece)
            continue
        waiting.append(_submitted(pool, number, piece))
        if len(waiting) > at_once:
            yield _received(waiting.popleft())
    yield from map(_received, waiting)


def _submitted(pool: ProcessPoolExecutor, number: int, piece: Piece) -> Future[Path]:
    """The first one forks the workers: a signal in the middle of that would be lost, so it waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        return pool.submit(_do, number, piece)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _received(handed_over: Future[Path]) -> Result:
    part = handed_over.result()
    with part.open("rb") as file:
        result: Result = pickle.load(file)  # noqa: S301 - our own child wrote it, where only we may write
    part.unlink()
    return result


_here: tuple[Work, Path] | None = None  # what this worker works on, and where it puts it


def _become_worker(work: Work, parts: Path, parent: int) -> None:
    """Before the first piece: die with the parent, leave Ctrl-C to it, and be one thread of many processes."""
    global _here
    _here = work, parts
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it is gone: nobody is left to be told, and an exception would be printed
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _do(number: int, piece: Piece) -> Path:
    assert _here is not None
    work, parts = _here
    part = parts / str(number)
    with part.open("wb") as file:
        pickle.dump(work.tokenised(piece), file, protocol=5)
    return part
