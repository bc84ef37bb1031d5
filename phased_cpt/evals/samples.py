"""What a model says when it goes on with a held-out text: a few prompts, the same ones in every phase of a run.

held-out document   [ the prompt | what the text says ]        the model: [ the prompt | what it says ]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phased_cpt.data.blocks import Blocks
from phased_cpt.evals.heldout import measuring

PROMPT_TOKENS, SAID_TOKENS = 32, 48


@dataclass(frozen=True)
class Prompt:
    """The beginning of a held-out document, as ids, and how it goes on."""

    set: str
    ids: tuple[int, ...]
    continues: tuple[int, ...]


def prompts_of(sets: Mapping[str, Blocks], count: int) -> list[Prompt]:
    """A document of each set in turn: the first long ones of it, so that no run draws others."""
    each = {name: _documents(blocks, count) for name, blocks in sets.items()}
    in_turn = [(name, each[name][at]) for at in range(count) for name in each if at < len(each[name])]
    return [Prompt(name, ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:]) for name, ids in in_turn[:count]]


def _documents(blocks: Blocks, count: int) -> list[tuple[int, ...]]:
    """Beginnings of documents with enough to go on with, at most one of a row."""
    found: list[tuple[int, ...]] = []
    wanted = PROMPT_TOKENS + SAID_TOKENS
    for block in range(len(blocks)):
        if len(found) == count:
            break
        slices, begin = blocks.slices_of(block), 0
        for length, context in zip(slices.length.tolist(), slices.context.tolist(), strict=True):
            if length > wanted and not context:
                found.append(tuple(blocks[block]["input_ids"][begin : begin + wanted].tolist()))
                break
            begin += length
    return found


def said(
    model: nn.Module, prompts: Sequence[Prompt], device: torch.device, beat: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """What the model finds likeliest, token by token. Collective: under ZeRO-3 every rank runs the same forwards."""
    if not prompts:
        return []
    ids: Tensor = torch.tensor([prompt.ids for prompt in prompts], device=device)
    with torch.no_grad(), measuring(model):
        for _ in range(SAID_TOKENS):
            beat()  # each of them gathers every weight, under ZeRO-3
            logits: Any = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    found: list[list[int]] = ids[:, PROMPT_TOKENS:].tolist()
    return found
