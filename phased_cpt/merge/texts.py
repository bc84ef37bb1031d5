"""A few held-out windows: to compare what two models say of them, and to measure how well one says it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from phased_cpt.data.blocks import IGNORED
from phased_cpt.data.index import open_blocks
from phased_cpt.errors import InputError

HELD_OUT = "held-out documents"
LONGEST = 128  # tokens; where a weight is wrong, few of them tell


@dataclass(frozen=True)
class Windows:
    """Rows of equal length."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    of: str

    @property
    def are_held_out(self) -> bool:
        return self.of == HELD_OUT

    def first(self, count: int, length: int) -> "Windows":
        cut = (slice(0, count), slice(0, length))
        return Windows(self.ids[cut], self.positions[cut], self.labels[cut], self.of)

    def parts(self, rows: int) -> list["Windows"]:
        cuts = [slice(at, at + rows) for at in range(0, len(self.ids), rows)]
        return [Windows(self.ids[cut], self.positions[cut], self.labels[cut], self.of) for cut in cuts]

    def loss(self, logits: Tensor) -> tuple[float, int]:
        """The sum over tokens, and how many they are."""
        wanted = self.labels[:, 1:].reshape(-1).to(logits.device)
        losses = cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum")
        return float(losses), int((wanted != IGNORED).sum())


def held_out(index: Path, count: int) -> Windows:
    """The beginnings of the first held-out rows of a phase."""
    blocks = open_blocks(index)
    rows = [blocks[at] for at in range(min(count, len(blocks)))]
    length = min(LONGEST, blocks.shape.max_tokens)
    ids, positions, labels = (
        torch.from_numpy(np.stack([row[key][:length] for row in rows]))
        for key in ("input_ids", "position_ids", "labels")
    )
    return Windows(ids, positions, labels, HELD_OUT)


def own_text(tokenizer: Path, vocabulary: int) -> Windows:
    """Where there are no held-out documents: this page, or, without a tokenizer, ids at random."""
    try:
        ids = AutoTokenizer.from_pretrained(tokenizer)(Path(__file__).read_text(), return_tensors="pt").input_ids
    except (OSError, ValueError, KeyError):
        ids = None
    if ids is None or ids.shape[1] < LONGEST:
        ids = torch.randint(vocabulary, (2, LONGEST), generator=torch.Generator().manual_seed(0))
        return Windows(ids, _places(ids), ids, "random tokens")
    if int(ids.max()) >= vocabulary:
        raise InputError(f"{tokenizer}: has ids beyond the {vocabulary} of the model; name the tokenizer of this model")
    ids = ids[:, : ids.shape[1] // LONGEST * LONGEST].reshape(-1, LONGEST)
    return Windows(ids, _places(ids), ids, "a page of text")


def _places(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(ids.shape)
