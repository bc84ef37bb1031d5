"""What a model says to a question: freely, the likeliest token each time, and led along an answer that is right.

prompt  "What ends a document?"                 accepted  "one EOS token"
freely  prompt ─→ "an EOS" <end>                          exact match, ROUGE-L
led     prompt + "one EOS token" ─→ an EOS token          token accuracy: 2 of 3 tokens are what it ranks first
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from phased_cpt.errors import InputError
from phased_cpt.evals.heldout import measuring
from phased_cpt.evaluate.course import Course
from phased_cpt.evaluate.questions import Question
from phased_cpt.evaluate.scores import best, is_exact, rouge_l

SPARE_TOKENS = 16  # what may stand around an answer
MARK = "§answer§"

Ids = list[int]


@dataclass(frozen=True)
class Asked:
    """A question in tokens."""

    prompt: Ids
    answers: list[Ids]
    new_tokens: int
    cut: int  # tokens of the prompt that do not fit


def judged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], course: Course
) -> dict[str, Any]:
    """The means over all questions, and what was said to each."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ends = _ends(model, tokenizer)
    found: list[dict[str, float]] = []
    answers: list[dict[str, Any]] = []
    cut = 0
    with torch.inference_mode(), measuring(model):
        for question in questions:
            asked = in_tokens(question, tokenizer, context)
            said = str(tokenizer.decode(_freely(model, asked, ends), skip_special_tokens=True))
            scores = {
                "exact_match": best(is_exact, said, question.answers),
                "token_accuracy": max(_led(model, asked.prompt, answer) for answer in asked.answers),
                "rouge_l": best(rouge_l, said, question.answers),
            }
            found.append(scores)
            answers.append({"question": question.where, "said": said} | scores)
            cut += asked.cut > 0
            course.advance("questions", 1)
    if cut:
        course.tell(f"{cut} prompts are longer than {context} tokens leave room for; of these the end is read")
    means = {measure: fmean(scores[measure] for scores in found) for measure in found[0]}
    return means | {"questions": len(answers), "answers": answers}


def in_tokens(question: Question, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Asked:
    """A user's turn where the tokenizer knows chats, else plain text that the answer follows as it is written."""
    answers = [_ids(tokenizer, answer) for answer in question.answers]
    longest = max(map(len, answers))
    new_tokens = 2 * longest + SPARE_TOKENS
    if context is not None:
        if longest > context // 2:
            raise InputError(f"{question.where}: answer: {longest} tokens, and the model reads {context} in all")
        new_tokens = min(new_tokens, context // 2)
    prompt = _turn(question, tokenizer) if tokenizer.chat_template else _beginning(question.prompt, tokenizer)
    room = len(prompt) if context is None else context - new_tokens
    return Asked(prompt[-room:], answers, new_tokens, max(0, len(prompt) - room))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _beginning(prompt: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """With what the tokenizer puts before a text, and without the EOS that some put behind it."""
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def _turn(question: Question, tokenizer: PreTrainedTokenizerBase) -> Ids:
    turn = [{"role": "user", "content": question.prompt}]
    try:
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise InputError(f"{question.where}: the chat template does not take it as a user's turn: {error}") from None
    return _ids(tokenizer, str(text))


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The tokens that end an answer: EOS, what the model itself says, and what ends a turn of a chat.

    Each of them is no ordinary token: a model of a tokenizer of one's own may name one by the default of its kind.
    """
    of_model = getattr(model.generation_config, "eos_token_id", None)
    ends = of_model if isinstance(of_model, list) else [of_model]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        behind = str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition(MARK)[2]
        ends = [*ends, *_ids(tokenizer, behind)[:1]]
    known = {end for end in ends if end in tokenizer.added_tokens_decoder}
    return sorted(known | ({tokenizer.eos_token_id} - {None}))


def _freely(model: PreTrainedModel, asked: Asked, ends: Ids) -> Ids:
    """Greedy, whatever the model's own generation_config would draw or punish."""
    ids = torch.tensor([asked.prompt], device=model.device)
    how = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=asked.new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    found: Any = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)  # type: ignore[operator]
    return [each for each in found[0, len(asked.prompt) :].tolist() if each not in ends]


def _led(model: PreTrainedModel, prompt: Ids, answer: Ids) -> float:
    """The share of an answer's tokens that the model ranks first, each behind the prompt and the tokens before it."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0]
    first = logits[-len(answer) - 1 : -1].argmax(-1)
    return float((first == ids[0, len(prompt) :]).float().mean())
