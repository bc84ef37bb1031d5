"""What a model says: freely the likeliest token, led along what is right; on figures that can be counted."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from phased_cpt.errors import InputError
from phased_cpt.evaluate.answers import _ends, _freely, _led, in_tokens
from phased_cpt.evaluate.questions import Question
from tests.conftest import SAMPLE
from tests.journeys.conftest import SHAPE

pytestmark = pytest.mark.requirement("E-04")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(SAMPLE)
    return loaded


@pytest.fixture
def plain(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    """The same, and it knows no chats."""
    monkeypatch.setattr(tokenizer, "chat_template", None)
    return tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{key: value for key, value in SHAPE.items() if key != "model_type"})).eval()


class Counting(nn.Module):
    """It ranks first whatever comes next in counting."""

    device = torch.device("cpu")

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> CausalLMOutput:
        assert not use_cache
        logits = torch.nn.functional.one_hot(input_ids + 1, 20).float()
        return CausalLMOutput(logits=logits[:, -logits_to_keep:])


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ([6, 7, 8], 1.0),
        ([6, 7, 9], 2 / 3),  # 8 would follow 7
        ([9, 10, 11], 2 / 3),  # 6 would follow 5; then it is led by the answer and goes on from 9
        ([9, 9], 0.0),
        ([6], 1.0),
    ],
)
def test_token_accuracy_is_the_share_that_is_ranked_first(answer: list[int], share: float) -> None:
    model: Any = Counting()
    assert _led(model, [3, 5], answer) == pytest.approx(share)


def test_an_answer_is_the_likeliest_token_each_time_whatever_the_model_would_rather(model: LlamaForCausalLM) -> None:
    ids = [5, 6, 7, 8]
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    question = Question("q.jsonl:1", "?", ("a",))
    asked = in_tokens(question, AutoTokenizer.from_pretrained(SAMPLE), None)
    asked = type(asked)([5, 6, 7, 8], asked.answers, 20, 0)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=1e-3, max_length=5)
    assert _freely(model, asked, []) == ids[4:]
    drawn = model.generate(torch.tensor([ids[:4]]), max_new_tokens=20)[0, 4:].tolist()
    assert drawn != ids[4:], "so its own ways would have been seen"
    assert len(set(ids[4:])) > 10, "and a penalty below one, which is for repeating"
    end = ids[10]
    until = ids[4:].index(end) + 1
    assert _freely(model, asked, [end]) == ids[4 : 3 + until], "it ends before the token that ends"


def test_a_prompt_is_a_users_turn_where_the_tokenizer_knows_chats(tokenizer: PreTrainedTokenizerBase) -> None:
    question = Question("q.jsonl:1", "What ends a document?", ("an EOS", "EOS"))
    asked = in_tokens(question, tokenizer, 256)
    said = "<|im_start|>user\nWhat ends a document?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asked.prompt) == said
    assert [tokenizer.decode(answer) for answer in asked.answers] == ["an EOS", "EOS"]
    assert asked.new_tokens == 2 * max(map(len, asked.answers)) + 16
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>", "<|pad|>")]
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE | {"eos_token_id": [ends[2], 77]}))
    assert _ends(model, tokenizer) == sorted(ends), "77 is a word"


def test_a_prompt_is_plain_text_where_it_does_not(plain: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    asked = in_tokens(Question("q.jsonl:1", "2 + 2 =", (" 4",)), plain, 256)
    assert plain.decode(asked.prompt + asked.answers[0]) == "2 + 2 = 4"
    model.generation_config.eos_token_id = None
    assert _ends(model, plain) == [plain.convert_tokens_to_ids("<|endoftext|>")], "no turn ends here"


def test_a_long_prompt_keeps_its_end_and_a_long_answer_is_refused(plain: PreTrainedTokenizerBase) -> None:
    prompt = " ".join(f"line {at}" for at in range(200))
    asked = in_tokens(Question("q.jsonl:1", prompt, ("a",)), plain, 64)
    whole = plain(prompt)["input_ids"]
    assert (len(asked.prompt), asked.new_tokens) == (64 - 18, 18), "2 · 1 + 16 of 64 are for the answer"
    assert asked.prompt == whole[-46:] and asked.cut == len(whole) - 46
    assert in_tokens(Question("q.jsonl:1", prompt, ("a",)), plain, None).cut == 0
    half = in_tokens(Question("q.jsonl:1", prompt, ("a " * 20,)), plain, 64)
    assert (half.new_tokens, len(half.prompt)) == (32, 32), "half of what it reads at most"
    with pytest.raises(InputError, match=r"q\.jsonl:9: answer: \d+ tokens, and the model reads 64 in all"):
        in_tokens(Question("q.jsonl:9", "?", ("a", "line " * 40)), plain, 64)


def test_a_template_that_takes_no_user_is_told(plain: PreTrainedTokenizerBase) -> None:
    plain.chat_template = "{{ raise_exception('only tools talk here') }}"
    with pytest.raises(InputError, match=r"q\.jsonl:1: the chat template does not take it .* only tools talk here"):
        in_tokens(Question("q.jsonl:1", "?", ("a",)), plain, 64)
