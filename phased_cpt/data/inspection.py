"""A block as text: where its documents begin, what is context only, what nothing is learnt from."""

from collections.abc import Iterator

import numpy as np
from rich.text import Text

from phased_cpt.data.blocks import IGNORED, Blocks
from phased_cpt.data.chunks import Integers
from phased_cpt.data.prepare import PreparedRun, PreparedSplit
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
    row, pieces, at = blocks[number], blocks.slices_of(number), 0
    for store, start, length in zip(pieces.store, pieces.start, pieces.length, strict=True):
        share = split.shares[int(store)]
        offsets = share.store.offsets
        document = int(np.searchsorted(offsets, start, side="right")) - 1
        begin, end = int(start - offsets[document]), int(start - offsets[document] + length)
        whole = int(offsets[document + 1] - offsets[document])
        where = "" if length == whole else f", tokens {begin:,} to {end:,} of {whole:,}"
        yield f"\n── document {document} of {share.store.name}{where} ──\n", BORDER
        labels, ids = row["labels"][at : at + length], row["input_ids"][at : at + length]
        trained = int(np.argmax(labels != IGNORED)) if (labels != IGNORED).any() else len(labels)
        yield f"⟦{_text(run, ids[:trained])}⟧", UNLABELLED
        yield _text(run, ids[trained:])
        at += int(length)
    if at < len(row["labels"]):
        yield f"\n── {len(row['labels']) - at:,} positions of padding ──\n", BORDER


def _text(run: PreparedRun, ids: Integers) -> str:
    return str(run.tokenizer.reference.decode(ids.tolist(), skip_special_tokens=False))
