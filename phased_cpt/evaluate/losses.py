"""The loss of rows without all of their logits: what the model makes of hidden states, some tokens at a time.

rows ─ decoder ─ hidden states ─┬ 512 tokens ─ head, and whatever the model does behind it ─ cross-entropy ─┐
                                └ 512 tokens ─ …                                                            ┴ sum
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from phased_cpt.data.blocks import IGNORED

CHUNK_ELEMENTS = 2**26  # logits at a time, 256 MB in fp32: those of a row of 32K tokens and 152K words are 20 GB


def row_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The summed loss of each row, one token predicting the next.

    Positions begin anew at every document, and keep documents apart; flash attention looks for that in a batch of one
    row alone, so there the rows stand behind each other in one.
    """
    labels, decoder = batch["labels"], model.base_model
    shape = (1, -1) if str(model.config._attn_implementation).startswith("flash") else labels.shape
    inputs = {name: batch[name].reshape(shape) for name in ("input_ids", "position_ids")}
    whole = decoder(**inputs, use_cache=False)
    hidden = whole.last_hidden_state.view(*labels.shape, -1)[:, :-1]
    size = max(128, CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
    totals = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for row, (states, right) in enumerate(zip(hidden, labels[:, 1:], strict=True)):
        kept = right != IGNORED
        for states_part, right_part in zip(states[kept].split(size), right[kept].split(size), strict=True):
            with _says(decoder, type(whole)(last_hidden_state=states_part[None])):
                logits = model(input_ids=batch["input_ids"][:1, :1], use_cache=False).logits[0]
            totals[row] += cross_entropy(logits.float(), right_part, reduction="sum")
    return totals


@contextlib.contextmanager
def _says(decoder: nn.Module, output: Any) -> Iterator[None]:
    """The decoder hands out hidden states that are there already, so that the model goes on from them."""
    decoder.__dict__["forward"] = lambda *given, **named: output
    try:
        yield
    finally:
        del decoder.__dict__["forward"]
