"""From what was typed to the ids that a model continues.

plain   prompt ─────────────────────────────────── ids     as the documents of a base model begin
chat    turns so far + prompt ─ chat template ──── ids     as an instruct model was taught
        too long for the model: the oldest turns go, and then the beginning of what is left; the end stays
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phased_cpt.errors import PhasedCptError

Mode = Literal["chat", "plain"]
NO_LIMIT = 1_000_000  # tokenizers say 10**30 where nothing is known


@dataclass
class Turn:
    """What was asked, and what each model said to it."""

    prompt: str
    answers: dict[str, str] = field(default_factory=dict)

    def answer_of(self, name: str) -> str:
        """A model's own words; those of another where it was not asked."""
        return self.answers.get(name, next(iter(self.answers.values()), ""))


@dataclass(frozen=True)
class Prompt:
    """What a model continues, and what had to be left out."""

    ids: list[int]
    max_tokens: int  # that there is room for
    notes: tuple[str, ...] = ()


def mode_of(tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> Mode:
    return "plain" if plain or not tokenizer.chat_template else "chat"


def prompt_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mode: Mode,
    turns: Sequence[Turn],
    prompt: str,
    name: str,
    max_tokens: int,
) -> Prompt:
    """The ids of a prompt, cut from the left so that an answer still fits behind it."""
    longest = longest_row(model, tokenizer)
    room = longest - min(max_tokens, longest // 2)  # an answer longer than the model must leave some of the prompt
    turns = list(turns) if mode == "chat" else []
    notes = []
    ids = _ids(tokenizer, mode, turns, prompt, name)
    before = len(turns)
    while len(ids) > room and turns:
        turns = turns[1:]
        ids = _ids(tokenizer, mode, turns, prompt, name)
    if len(turns) < before:
        notes.append(f"{before - len(turns)} of {before} earlier turns are left out: the model reads {longest} tokens")
    if len(ids) > room:
        notes.append(f"the prompt has {len(ids)} tokens: its last {room} are read ({longest} less room to answer)")
        first = ids[:1] if ids[0] == tokenizer.bos_token_id else []
        ids = first + ids[len(ids) - room + len(first) :]
    if len(ids) + max_tokens > longest:
        notes.append(f"there is room for {longest - len(ids)} tokens of an answer, not for {max_tokens}")
    return Prompt(ids, min(max_tokens, longest - len(ids)), tuple(notes))


def longest_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model can look at."""
    config: Any = model.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return min(int(known), NO_LIMIT)


def _ids(tokenizer: PreTrainedTokenizerBase, mode: Mode, turns: Sequence[Turn], prompt: str, name: str) -> list[int]:
    return _plain_ids(tokenizer, prompt) if mode == "plain" else _chat_ids(tokenizer, turns, prompt, name)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """With what the tokenizer puts before a text; `<|endoftext|>`, if somebody types it, is so many letters."""
    ids = list(tokenizer(prompt, split_special_tokens=True)["input_ids"])
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # a tokenizer's own: behind it another text begins
        ids.pop()
    return ids


def _chat_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], prompt: str, name: str) -> list[int]:
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.prompt}]
        messages += [{"role": "assistant", "content": turn.answer_of(name)}]
    messages += [{"role": "user", "content": prompt}]
    try:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except TemplateError as error:
        raise PhasedCptError(f"the chat template refuses this: {error}; /mode plain does without it") from None
    return list(ids)
