"""An answer: drawn from its seed, ended where the model ends it, and heard as it is made."""

import pytest
import torch

from phased_cpt.chat.answer import Answer, Heard, Stop, answer, decoded, end_ids
from phased_cpt.chat.prompt import Prompt, Turn, prompt_for
from phased_cpt.chat.screen import clean
from phased_cpt.chat.settings import LIMITS, Settings, changed
from phased_cpt.errors import InputError
from phased_cpt.model.lineup import Lineup

GREEDY = Settings(temperature=0.0, max_tokens=16)


def said(lineup: Lineup, name: str, settings: Settings, prompt: str = "def main(", **more: object) -> Answer:
    with lineup.as_(name) as model:
        ready = prompt_for(model, lineup.tokenizer, "plain", (), prompt, name, settings.max_tokens)
        return answer(model, lineup.tokenizer, ready, settings, **more)  # type: ignore[arg-type]


@pytest.mark.requirement("I-01")
def test_the_same_seed_says_the_same_and_each_model_its_own(lineup: Lineup) -> None:
    drawn = Settings(temperature=1.0, max_tokens=16, seed=7)
    assert said(lineup, "base", drawn).text == said(lineup, "base", drawn).text
    assert said(lineup, "base", drawn).text != said(lineup, "base", changed(drawn, "seed", "8")).text
    assert said(lineup, "base", drawn).text != said(lineup, "evolution", drawn).text


def test_temperature_0_is_the_likeliest_token_each_time(lineup: Lineup) -> None:
    with lineup.as_("evolution") as model, torch.no_grad():
        ids = list(lineup.tokenizer("def main(")["input_ids"])
        begin = len(ids)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    likeliest = decoded(lineup.tokenizer, ids[begin:], set())
    found = [said(lineup, "evolution", Settings(temperature=t, max_tokens=8, seed=s)).text for t, s in ((0, 1), (0, 2), (2, 1))]  # fmt: skip
    assert found[:2] == [likeliest, likeliest] and found[2] != likeliest


@pytest.mark.requirement("I-04")
@pytest.mark.parametrize("place", ["tokenizer", "one of generation_config's"])
def test_an_answer_ends_at_eos(place: str, lineup: Lineup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this model says fourth is made the end."""
    heard: list[str] = []
    usual = lineup.tokenizer.eos_token
    assert said(lineup, "evolution", GREEDY).ended == "max_tokens", "left alone it goes on"
    with lineup.as_("evolution") as model:
        ids = torch.tensor([lineup.tokenizer("def main(")["input_ids"]])
        spoken = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()  # type: ignore[operator]
        end = spoken[3]
        first = spoken.index(end)
        if place == "tokenizer":
            lineup.tokenizer.eos_token = lineup.tokenizer.convert_ids_to_tokens(end)
        else:
            assert model.generation_config is not None
            monkeypatch.setattr(model.generation_config, "eos_token_id", [3, end])
            monkeypatch.setattr(type(lineup.tokenizer), "added_tokens_decoder", {3: "a", end: "b"})
        assert end in end_ids(model, lineup.tokenizer)
    try:
        found = said(lineup, "evolution", GREEDY, say=heard.append)
    finally:
        lineup.tokenizer.eos_token = usual
    assert (found.ended, found.tokens) == ("end of text", first + 1)
    assert found.text == "".join(heard) == decoded(lineup.tokenizer, spoken[:first], set())


def test_a_stop_ends_it_at_the_next_token(lineup: Lineup) -> None:
    stop = Stop()
    stop.asked = True
    found = said(lineup, "base", GREEDY, stop=stop)
    assert (found.ended, found.tokens) == ("stopped", 1)


@pytest.mark.parametrize("text", ["naïve 日本語 🙂🙂 λ", "def f(x):\n\treturn  x\n\n\n", "a 🏳️‍🌈 flag"])
def test_letters_of_several_tokens_are_said_whole(text: str, lineup: Lineup) -> None:
    ids = list(lineup.tokenizer(text)["input_ids"])
    pieces: list[str] = []
    heard = Heard(lineup.tokenizer, {0}, pieces.append)
    heard.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for id_ in ids:
        heard.put(torch.tensor([id_]))
    heard.end()
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) and len(pieces) > 1
    alone = [str(lineup.tokenizer.decode([id_])) for id_ in ids]
    assert "".join(alone) == text or any("\ufffd" in piece for piece in alone), "token by token they would be broken"


def test_half_a_letter_at_the_end_is_not_kept_back(lineup: Lineup) -> None:
    ids = list(lineup.tokenizer("ok 🙂")["input_ids"])[:-1]
    pieces: list[str] = []
    heard = Heard(lineup.tokenizer, {0}, pieces.append)
    heard.put(torch.tensor([5]))
    for id_ in ids:
        heard.put(torch.tensor([id_]))
    assert "".join(pieces).startswith("ok")
    heard.end()
    assert "".join(pieces) == lineup.tokenizer.decode(ids)


def test_what_a_terminal_would_obey_is_taken_out() -> None:
    assert clean("a\x1b[31mred\x07\r\x9b2J\u202eb\tc\nd") == "a[31mred2Jb\tc\nd"


def made(lineup: Lineup, prompt: str, max_tokens: int, turns: tuple[Turn, ...] = (), mode: str = "plain") -> Prompt:
    with lineup.as_("base") as model:
        return prompt_for(model, lineup.tokenizer, mode, turns, prompt, "base", max_tokens)  # type: ignore[arg-type]


def test_a_long_prompt_keeps_its_end(lineup: Lineup) -> None:
    """The model reads 8192 tokens."""
    text = " ".join(f"number {at}" for at in range(5000))
    ids = list(lineup.tokenizer(text)["input_ids"])
    assert len(ids) > 8192
    found = made(lineup, text, 192)
    assert found.ids == ids[-8000:] and found.max_tokens == 192
    assert found.notes == (f"the prompt has {len(ids)} tokens: its last 8000 are read (8192 less room to answer)",)
    short = made(lineup, "def f", 192)
    assert short.ids == list(lineup.tokenizer("def f")["input_ids"]) and short.notes == ()
    greedy = made(lineup, text, 100_000)
    assert greedy.ids == ids[-4096:] and greedy.max_tokens == 4096
    assert "there is room for 4096 tokens of an answer, not for 100000" in greedy.notes


def test_the_text_of_a_special_token_is_text(lineup: Lineup) -> None:
    ids = made(lineup, "a <|endoftext|> b", 9).ids
    assert lineup.tokenizer.eos_token_id not in ids and lineup.tokenizer.decode(ids) == "a <|endoftext|> b"
    assert lineup.tokenizer.eos_token_id in lineup.tokenizer("a <|endoftext|> b")["input_ids"]


def test_a_conversation_is_written_by_the_chat_template_and_its_oldest_turns_go_first(lineup: Lineup) -> None:
    turns = (Turn("one", {"base": "of base", "evolution": "of evolution"}), Turn("two", {"evolution": "only his"}))
    text = lineup.tokenizer.decode(made(lineup, "three", 9, turns, "chat").ids)
    assert text == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nof base<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nonly his<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )
    long = Turn("many " * 9000, {"base": "of base"})
    found = made(lineup, "three", 9, (long, turns[1]), "chat")
    assert lineup.tokenizer.decode(found.ids) == text[text.index("<|im_start|>user\ntwo") :]
    assert found.notes == ("1 of 2 earlier turns are left out: the model reads 8192 tokens",)


@pytest.mark.requirement("I-02")
@pytest.mark.parametrize(
    "name, given, problem",
    [
        ("temperature", "warm", "temperature: warm is no number; a number from 0 to 5"),
        ("temperature", "-1", "temperature: -1 is out of its range; a number from 0 to 5"),
        ("temperature", "nan", "temperature: nan is out of its range"),
        ("top_p", "0", "top_p: 0 is out of its range; a number from 0.01 to 1"),
        ("top_k", "2.5", "top_k: 2.5 is no whole number; a whole number from 0 to"),
        ("max_tokens", "0", "max_tokens: 0 is out of its range; a whole number from 1 to"),
        ("repetition_penalty", "0", "repetition_penalty: 0 is out of its range"),
        ("temprature", "1", "there is no setting temprature; did you mean temperature?"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(name: str, given: str, problem: str) -> None:
    with pytest.raises(InputError) as refused:
        changed(Settings(), name, given)
    assert str(refused.value).startswith(problem)


@pytest.mark.requirement("I-02")
def test_every_setting_changes_what_is_said(lineup: Lineup) -> None:
    """A dead one would leave the answer as it is."""
    free, likeliest = (
        Settings(temperature=2.0, top_p=1.0, top_k=0, max_tokens=24),
        Settings(temperature=0, max_tokens=24),
    )
    others = {
        "temperature": (free, "0"),
        "top_p": (free, "0.01"),
        "top_k": (free, "1"),
        "max_tokens": (free, "3"),
        "seed": (free, "1"),
        "repetition_penalty": (likeliest, "9"),
    }
    assert set(others) == set(LIMITS)
    for name, (usual, value) in others.items():
        found = [said(lineup, "evolution", each).text for each in (usual, usual, changed(usual, name, value))]
        assert found[0] == found[1] != found[2], name
