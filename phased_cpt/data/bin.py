"""Tokens as two plain files, for other programs and from them:

phase1_foundation.train.bin             ids, one document behind the other, each with its EOS
phase1_foundation.train.bin.meta.json   {"dtype": "uint16", "tokens": 66291, "eos_id": 0, …}: how to read it back
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.chunks import Integers
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.errors import InputError
from phased_cpt.run_dir import publish_file, sync_folder

DTYPES = ("uint16", "uint32")
CHECKED_AT_ONCE = 2**24


def meta_file(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def write_bin(path: Path, documents: Iterable[NDArray[Any]], tokenizer: Tokenizer) -> None:
    """The documents behind each other; the meta file last, so that a torn .bin has none."""
    meta_file(path).unlink(missing_ok=True)
    tokens = count = 0
    with beside(path) as file:
        for ids in documents:
            file.write(ids.astype(tokenizer.dtype, copy=False).tobytes())
            tokens, count = tokens + len(ids), count + 1
    meta = {
        "dtype": tokenizer.dtype,
        "tokens": tokens,
        "documents": count,
        "vocab_size": tokenizer.vocabulary,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.digest,
    }
    publish_file(meta_file(path), (json.dumps(meta, indent=2) + "\n").encode())


@contextlib.contextmanager
def beside(path: Path) -> Iterator[IO[bytes]]:
    """A large file that appears when it is whole; nobody else writes to the one beside it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_bin(path: Path, tokenizer: Tokenizer) -> tuple[NDArray[Any], Integers]:
    """The ids, mapped, and the length of each document: an EOS ends one, and so does the end of the file."""
    meta = _meta(path)
    size, itemsize = path.stat().st_size, np.dtype(meta["dtype"]).itemsize
    expected = meta.get("tokens", meta.get("n_sequences", 0) * meta.get("seq_len", 0)) or size // itemsize
    if size != expected * itemsize or not size:
        found = f"{size} bytes, and {meta_file(path).name} says {expected} ids of {meta['dtype']}"
        raise InputError(f"{path}: {found}; the file may be incomplete")
    if meta.get("tokenizer", tokenizer.digest) != tokenizer.digest:
        raise InputError(f"{path}: made with another tokenizer than {tokenizer.name}; make it anew from its texts")
    if meta.get("eos_id", tokenizer.eos_id) != tokenizer.eos_id:
        ours = f"id {tokenizer.eos_id} of {tokenizer.name}"
        raise InputError(
            f"{path}: its documents end with id {meta['eos_id']}, and not with {ours}; set model.eos_token"
        )
    ids = np.asarray(np.memmap(path, meta["dtype"], "r"))
    ends = []
    for start in range(0, len(ids), CHECKED_AT_ONCE):
        part = ids[start : start + CHECKED_AT_ONCE]
        if part.max() >= tokenizer.vocabulary:
            raise InputError(f"{path}: id {part.max()}, and {tokenizer.name} has {tokenizer.vocabulary}")
        ends.append(np.flatnonzero(part == tokenizer.eos_id) + start + 1)
    return ids, _lengths(path, np.concatenate(ends), len(ids), tokenizer)


def _lengths(path: Path, ends: Integers, count: int, tokenizer: Tokenizer) -> Integers:
    if not len(ends):
        raise InputError(f"{path}: no document ends in it (id {tokenizer.eos_id}, {tokenizer.eos}); is it this one's?")
    return np.diff(np.unique(np.append(ends, count)), prepend=0)


def _meta(path: Path) -> dict[str, Any]:
    file = meta_file(path)
    try:
        meta = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: {file.name} is missing; it says how wide the ids are") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON that can be read: {error}") from None
    if not isinstance(meta, dict) or meta.get("dtype") not in DTYPES:
        given = meta.get("dtype") if isinstance(meta, dict) else meta
        raise InputError(f"{file}: dtype: given {str(given)[:40]!r}; allowed: {', '.join(DTYPES)}")
    for key in ("tokens", "n_sequences", "seq_len", "eos_id"):
        if key in meta and (isinstance(meta[key], bool) or not isinstance(meta[key], int) or meta[key] < 0):
            raise InputError(f"{file}: {key}: given {str(meta[key])[:40]!r}; allowed: a whole number")
    return meta
