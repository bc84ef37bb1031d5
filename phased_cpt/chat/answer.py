"""One answer of one model: drawn from a seed, heard while it is made, and stopped where it ends."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from phased_cpt.chat.prompt import Prompt
from phased_cpt.chat.settings import Settings
from phased_cpt.errors import PhasedCptError

Say = Callable[[str], object]
HALF_A_LETTER = "\ufffd"


@dataclass(frozen=True)
class Answer:
    """What a model has said, and why it said no more."""

    text: str
    tokens: int
    seconds: float
    ended: str  # "end of text", "max_tokens", "stopped"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def told(self) -> str:
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens_per_second:.0f} tokens/s; {self.ended}"

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": round(self.tokens_per_second, 1)}


class Stop(StoppingCriteria):
    """Whether somebody has had enough."""

    asked = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)


class Heard(BaseStreamer):
    """Says text as its tokens come; a letter of several tokens when the last of them is there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int], say: Say) -> None:
        self.ids: list[int] = []
        self._tokenizer, self._ends, self._say = tokenizer, ends, say
        self._read_prompt = False
        self._begin = self._said = 0  # what stands before a token decides on its blank, so a few are decoded again

    def put(self, value: Tensor) -> None:
        if not self._read_prompt:
            self._read_prompt = True
            return
        self.ids += value.flatten().tolist()
        before, now = self._text(self._begin, self._said), self._text(self._begin, len(self.ids))
        if len(now) > len(before) and not now.endswith(HALF_A_LETTER):
            self._say(now[len(before) :])
            self._begin, self._said = self._said, len(self.ids)

    def end(self) -> None:
        rest = self._text(self._begin, len(self.ids))[len(self._text(self._begin, self._said)) :]
        if rest:
            self._say(rest)

    def _text(self, begin: int, end: int) -> str:
        return decoded(self._tokenizer, self.ids[begin:end], self._ends)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    settings: Settings,
    *,
    say: Say = lambda piece: None,
    stop: Stop | None = None,
) -> Answer:
    """What the model says next."""
    ends = end_ids(model, tokenizer)
    stop = stop or Stop()
    heard = Heard(tokenizer, ends, say)
    ids = torch.tensor([prompt.ids], device=model.device)
    _without_flex(model)
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    try:
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_generation(settings, prompt.max_tokens, ends),
            stopping_criteria=StoppingCriteriaList([stop]),
            streamer=heard,
        )
    except torch.OutOfMemoryError:
        raise PhasedCptError(
            f"{model.device} has no room for this; try a shorter prompt, or fewer max_tokens"
        ) from None
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise PhasedCptError("this model's logits are not finite, so nothing can be drawn from them") from None
    seconds = time.perf_counter() - began
    ended = "end of text" if heard.ids and heard.ids[-1] in ends else "stopped" if stop.asked else "max_tokens"
    return Answer(decoded(tokenizer, heard.ids, ends), len(heard.ids), seconds, ended)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends a text: as the tokenizer says, and as the model's generation_config says, one or several."""
    said = model.generation_config.eos_token_id if model.generation_config else None
    listed = said if isinstance(said, list) else [said]
    # Of a model made from a shape, generation_config has Llama's numbers, which may be any word of this tokenizer.
    known = {id_ for id_ in listed if id_ is not None and id_ in tokenizer.added_tokens_decoder}
    return known | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> str:
    """The text of ids, without what ends it."""
    kept = [id_ for id_ in ids if id_ not in ends]
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _generation(settings: Settings, max_tokens: int, ends: set[int]) -> GenerationConfig:
    """Every setting, said: what is left out, transformers takes from the model's generation_config."""
    drawn = settings.temperature > 0
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens,
        min_new_tokens=0,
        do_sample=drawn,
        temperature=float(settings.temperature) if drawn else 1.0,
        top_p=settings.top_p if drawn else 1.0,
        top_k=settings.top_k if drawn else 50,  # the one value that transformers does not warn of
        repetition_penalty=settings.repetition_penalty,
        num_beams=1,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),  # one row is never padded; without it transformers warns
        use_cache=True,
    )


def _without_flex(model: PreTrainedModel) -> None:
    """Flex attention is compiled for each length, and an answer has one for every token."""
    if model.config._attn_implementation == "flex_attention":
        model.set_attn_implementation("sdpa")


@contextlib.contextmanager
def stopped_by_ctrl_c() -> Iterator[Stop]:
    """Ctrl-C ends the answer, and not the program; a second one, while nothing seems to happen, does."""
    stop = Stop()

    def asked(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
