"""One piece of a source becomes tokens, and how several processes share the pieces out.

pieces ─┬─ worker 1 ─┐
        ├─ worker 2 ─┼─ results in the order of the pieces, whoever was faster
        └─ worker 3 ─┘
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.backends import Backend, Encoded, Proof, by_reference, interleaved
from phased_cpt.data.bin import read_bin
from phased_cpt.data.chunks import Integers
from phased_cpt.data.documents import DIGEST_BYTES, Reading, read_documents
from phased_cpt.data.files import File, Piece, pieces_of
from phased_cpt.data.render import Document, Rendering
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.errors import PhasedCptError

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


class Work(NamedTuple):
    source: Source
    tokenizer: Tokenizer
    backend: Backend

    def do(self, piece: Piece) -> Result:
        """Read a piece and tokenise it, its head by the reference too."""
        source, tokenizer, backend = self
        reading, file = Reading(), source.files[piece.file]
        if file.format == "tokens":
            return _copied(piece, file, tokenizer)
        found = list(read_documents(source.files, piece, source.rendering, source.max_line_bytes, tokenizer, reading))
        if reading.bad and not source.skip_bad:
            found = []  # nothing comes of it: only the other problems are looked for
        compared, backend.slow_documents = int(backend.proof.compared.sum()), 0
        encoded = _framed(_encoded([each.document for each in found], backend), tokenizer)
        digests = b"".join(each.digest for each in found)
        news = backend.proof if backend.proof.compared.sum() != compared else None
        return Result(piece, *encoded, digests, reading, backend.slow_documents, news)


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


def _framed(encoded: Encoded, tokenizer: Tokenizer) -> tuple[NDArray[Any], Integers]:
    """Each document with the tokenizer's prefix and one EOS, unless it has them: a rendered chat often does."""
    ids, lengths = encoded
    ends = np.cumsum(lengths)
    begins = ends - lengths
    prefix = np.array(tokenizer.prefix, np.uint32)
    bare = np.ones(len(lengths), bool)
    for at, each in enumerate(prefix):
        fits = lengths > at
        bare[fits] &= ids[begins[fits] + at] != each
    open_ = np.ones(len(lengths), bool)
    open_[lengths > 0] = ids[ends[lengths > 0] - 1] != tokenizer.eos_id
    framed_ends = np.cumsum(lengths + bare * len(prefix) + open_)
    framed_begins = framed_ends - lengths - bare * len(prefix) - open_
    places = [framed_begins[bare] + at for at in range(len(prefix))]
    framed = np.empty(int(framed_ends[-1]) if len(lengths) else 0, tokenizer.dtype)
    is_text = np.ones(len(framed), bool)
    is_text[np.concatenate([framed_ends[open_] - 1, *places])] = False
    framed[is_text] = ids
    framed[framed_ends[open_] - 1] = tokenizer.eos_id
    for place, each in zip(places, prefix, strict=True):
        framed[place] = each
    return framed, framed_ends - framed_begins


def _copied(piece: Piece, file: File, tokenizer: Tokenizer) -> Result:
    """A .bin file is tokens already."""
    ids, lengths = read_bin(file.path, tokenizer)
    ends = np.cumsum(lengths)
    each = (ids[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True))
    digests = b"".join(sha256(document.astype("<u4").tobytes()).digest()[:DIGEST_BYTES] for document in each)
    reading = Reading(lines=len(lengths), documents=len(lengths))
    return Result(piece, ids.astype(tokenizer.dtype, copy=False), lengths, digests, reading, 0, None)


# Shared out ----------------------------------------------------------------------------------------------------------


def done(work: Work, workers: int) -> Iterator[Result]:
    """The pieces of a source, tokenised, in order; only a few more than there are workers are held at a time.

    Always in workers: the fast libraries start threads at their first text, and a process that has some cannot be
    forked any more without a deadlock.
    """
    pieces = pieces_of(work.source.files, work.source.max_line_bytes)
    context = multiprocessing.get_context("fork")  # what is loaded is theirs, too: nothing is loaded twice
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _become_worker, (work, os.getpid())) as pool:
        try:
            yield from _in_order(work, pieces, pool, at_once=2 * workers)
        except BrokenProcessPool:
            raise PhasedCptError("a worker that tokenises was killed; if memory was short, try --workers 1") from None
        except BaseException:
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.kill()  # nobody wants what it is at
            raise


def _in_order(work: Work, pieces: Iterator[Piece], pool: ProcessPoolExecutor, at_once: int) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    for piece in pieces:
        if work.source.files[piece.file].format == "tokens":  # nothing to share out: they are copied
            yield from (future.result() for future in waiting)
            waiting.clear()
            yield work.do(piece)
            continue
        waiting.append(_submitted(pool, piece))
        if len(waiting) > at_once:
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


def _submitted(pool: ProcessPoolExecutor, piece: Piece) -> Future[Result]:
    """The first one forks the workers: a Ctrl-C in the middle of that would be lost, so it waits."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_do, piece)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


_work_of_this_process: Work | None = None


def _become_worker(work: Work, parent: int) -> None:
    """Before the first piece: die with the parent, leave Ctrl-C to it, and be one thread of many processes."""
    global _work_of_this_process
    _work_of_this_process = work
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _do(piece: Piece) -> Result:
    assert _work_of_this_process is not None
    return _work_of_this_process.do(piece)
