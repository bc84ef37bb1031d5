"""Prepared data as plain files, for other programs and for eyes.

DIR/phase1_foundation.train.jsonl   a row a line: input_ids, position_ids, labels, in the order of the blocks
DIR/phase1_foundation.train.bin     the documents as ids, with .bin.meta.json beside
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from phased_cpt.data.bin import beside, write_bin
from phased_cpt.data.index import Share
from phased_cpt.data.prepared import PreparedRun, PreparedSplit
from phased_cpt.errors import InputError


def new_folder(option: str, folder: Path) -> Path:
    """Where files are to be written; asked for before anything is made that they would hold."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{option} {folder}: this is a file; name a folder") from None
    except OSError as error:
        raise InputError(f"{option} {folder}: cannot be made ({error.strerror}); name another folder") from None
    return folder


def rows(run: PreparedRun, folder: Path) -> None:
    """The rows that a model is trained and measured on; a file appears whole or not at all."""
    for name, split in _splits(run):
        blocks = split.index.blocks
        with beside(folder / f"{name}.jsonl") as file:
            for row in map(blocks.__getitem__, range(len(blocks))):
                plain = {key: row[key].tolist() for key in ("input_ids", "position_ids", "labels")}
                file.write(json.dumps(plain).encode() + b"\n")


def documents(run: PreparedRun, folder: Path) -> None:
    """The documents of each side, each once and whole: what a .bin source holds."""
    for name, split in _splits(run):
        if any(store.said is not None for store in split.stores):
            what = "a .bin would hold ids, and not which of them the assistant says (data.assistant_only_loss)"
            raise InputError(f"--emit-bin: {name}: {what}; --emit-jsonl writes rows with their labels")
    for name, split in _splits(run):
        each = (ids for share in split.shares for ids in _documents(share))
        write_bin(folder / f"{name}.bin", each, run.tokenizer)


def _documents(share: Share) -> Iterator[NDArray[Any]]:
    ids, offsets = share.store.ids, share.store.offsets
    for document in share.documents.tolist():
        yield ids[offsets[document] : offsets[document + 1]]


def _splits(run: PreparedRun) -> Iterator[tuple[str, PreparedSplit]]:
    for phase in run.phases:
        for side, split in phase.splits.items():
            yield f"{phase.plan.folder}.{side}", split
