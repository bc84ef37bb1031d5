"""Rows with as many labels as a test wants, and models that are small. Imports nothing heavier than torch."""

import numpy as np
import torch
from torch import Tensor

from phased_cpt.data.blocks import Blocks, Shape
from phased_cpt.data.chunks import Slices
from phased_cpt.evals.rows import Rows

TOKENS, WORDS = 64, 512
SHAPE = {
    "model_type": "llama", "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TOKENS, "tie_word_embeddings": False,
}  # fmt: skip


def rows_with(labels: list[int], seed: int = 0, tokens: int = TOKENS, words: int = WORDS) -> Blocks:
    """A row for each number, so many of its tokens with a label; the others are context."""
    rows = len(labels)
    ids = np.random.default_rng(seed).integers(3, words, rows * tokens)
    context, length = tokens - np.array(labels, np.int64), np.full(rows, tokens)
    slices = Slices(np.zeros(rows, np.int64), np.arange(rows) * tokens, length, context, np.zeros(rows, bool))
    return Blocks([ids], slices, np.arange(rows + 1), Shape(tokens, 1, 2))


def batch_of(blocks: Blocks) -> dict[str, Tensor]:
    """All rows at once."""
    rows = Rows(blocks)
    each = [rows[at] for at in range(len(rows))]
    return {key: torch.stack([row[key] for row in each]) for key in each[0]}
