"""A block as text: where its documents begin, what is context only, what nothing is learnt from."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from phased_cpt.data.blocks import IGNORED, Blocks
from phased_cpt.data.chunks import Integers, Slices
from phased_cpt.data.prepared import PreparedRun, PreparedSplit
from phased_cpt.errors import InputError

BORDER, UNLABELLED = "bold cyan", "yellow"


def shown_block(run: PreparedRun, which: str) -> Text:
    """`foundation:3`, or `foundation:eval:3`; what is not trained stands in ⟦ ⟧, so that a pipe shows it, too."""
    split, side, number = _found(run, which)
    blocks = split.index.blocks
    if not 0 <= number < len(blocks):
        raise InputError(f"--inspect {which}: there are {len(blocks)} blocks, 0 to {len(blocks) - 1}")
    labels = blocks[number]["labels"]
    heading = f"{which.partition(':')[0]}, {side}, block {number} of {len(blocks)}: "
    heading += f"{len(labels):,} positions, {int((labels != IGNORED).sum()):,} trained; ⟦not trained⟧\n"
    return Text.assemble((heading, "bold"), *_parts(run, split, blocks, number))


def block_facts(run: PreparedRun, which: str) -> dict[str, Any]:
    """The same for a program: the row, and which document each of its slices is of."""
    split, side, number = _found(run, which)
    blocks = split.index.blocks
    row = blocks[number]
    return {
        "phase": which.partition(":")[0],
        "split": side,
        "block": number,
        "slices": [part._asdict() for part in _slices(split, blocks.slices_of(number))],
        "row": {key: row[key].tolist() for key in ("input_ids", "position_ids", "labels")},
    }


class Part(NamedTuple):
    """A slice of a document in a block."""

    source: str
    document: int  # of that source, the first is 0
    begin: int  # in the document
    end: int
    tokens: int  # of the whole document
    context: int


def _slices(split: PreparedSplit, slices: Slices) -> Iterator[Part]:
    sources = split.sources
    columns = (slices.store, slices.start, slices.length, slices.context)
    for store, start, length, context in zip(*(column.tolist() for column in columns), strict=True):
        made = sources[store].store
        document = int(np.searchsorted(made.offsets, start, side="right")) - 1
        begin, after = int(made.offsets[document]), int(made.offsets[document + 1])
        yield Part(made.name, document, start - begin, start - begin + length, after - begin, context)


def _found(run: PreparedRun, which: str) -> tuple[PreparedSplit, str, int]:
    name, _, rest = which.partition(":")
    side, _, number = rest.rpartition(":")
    if not number.isdigit() or side not in ("", "train", "eval"):
        raise InputError(f"--inspect {which}: give PHASE:N, such as foundation:0, or PHASE:eval:N")
    splits, side = run.phase(name).splits, side or "train"
    if side not in splits:
        raise InputError(f"--inspect {which}: nothing of {name} is held out")
    return splits[side], side, int(number)


def _parts(run: PreparedRun, split: PreparedSplit, blocks: Blocks, number: int) -> Iterator[str | tuple[str, str]]:
    row, at = blocks[number], 0
    for part in _slices(split, blocks.slices_of(number)):
        length = part.end - part.begin
        where = "" if length == part.tokens else f", tokens {part.begin:,} to {part.end:,} of {part.tokens:,}"
        yield f"\n── document {part.document} of {part.source}{where} ──\n", BORDER
        labelled, ids = row["labels"][at : at + length] != IGNORED, row["input_ids"][at : at + length]
        borders = [0, *(np.flatnonzero(np.diff(labelled)) + 1).tolist(), length]
        for begin, end in itertools.pairwise(borders):
            text = _text(run, ids[begin:end])
            yield text if labelled[begin] else (f"⟦{text}⟧", UNLABELLED)
        at += length
    if at < len(row["labels"]):
        yield f"\n── {len(row['labels']) - at:,} positions of padding ──\n", BORDER


def _text(run: PreparedRun, ids: Integers) -> str:
    return str(run.tokenizer.reference.decode(ids.tolist(), skip_special_tokens=False))
