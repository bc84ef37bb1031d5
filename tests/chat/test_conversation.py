"""A conversation, line by line: what is typed, and what is seen of it."""

import re
from collections.abc import Callable

import pytest

from phased_cpt.chat.answer import answer
from phased_cpt.chat.conversation import COMMANDS
from phased_cpt.chat.prompt import prompt_for
from phased_cpt.chat.settings import LIMITS, Settings
from phased_cpt.model.lineup import Lineup
from tests.chat.conftest import SHORT, Talk

Talking = Callable[..., Talk]


def alone(lineup: Lineup, name: str, prompt: str) -> str:
    """What a model says when nobody else was asked."""
    with lineup.as_(name) as model:
        return answer(model, lineup.tokenizer, prompt_for(model, lineup.tokenizer, "plain", (), prompt, name, 12), SHORT).text  # fmt: skip


@pytest.mark.requirement("I-02")
def test_a_prompt_is_answered_by_the_tuned_model_with_its_figures(talking: Talking, lineup: Lineup) -> None:
    seen = talking()("def main(")
    assert alone(lineup, "evolution", "def main(") in seen
    assert alone(lineup, "base", "def main(") not in seen
    assert "[12 tokens in " in seen and " tokens/s; max_tokens]" in seen


@pytest.mark.requirement("I-01", "I-02")
def test_compare_shows_base_and_tuned(talking: Talking, lineup: Lineup) -> None:
    seen = talking()("/compare def main(")
    base, tuned = (alone(lineup, name, "def main(") for name in ("base", "evolution"))
    assert base != tuned
    assert seen.index("--- base: 12 tokens") < seen.index(base) < seen.index("--- evolution:") < seen.index(tuned)


def test_compare_alone_takes_the_last_prompt_and_names_say_whose(talking: Talking, lineup: Lineup) -> None:
    talk = talking()
    assert "type a prompt, or /compare PROMPT" in talk("/compare")
    talk("def main(")
    assert alone(lineup, "base", "def main(") in talk("/compare")
    both = talk("/compare foundation evolution")
    assert "--- foundation" in both and "--- evolution" in both and "--- base" not in both
    again = talk("/compare")
    assert "--- foundation" in again and "--- base" not in again
    one = talk("/compare foundation")
    assert "--- base" in one and "--- foundation" in one and "--- evolution" not in one
    assert len(talk.conversation.turns) == 1, "all of it was one prompt"
    assert "did you mean foundation?" in talk("/compare fondation evolution")
    prompt = talk("/compare evolution of a base")
    assert "--- base" in prompt and talk.conversation.turns[-1].prompt == "evolution of a base"


def test_names_on_the_command_line_answer_side_by_side_from_the_beginning(talking: Talking) -> None:
    seen = talking("base", "foundation")("def main(")
    assert "--- base" in seen and "--- foundation" in seen and "--- evolution" not in seen


@pytest.mark.parametrize("width, columns", [(80, True), (50, False)])
def test_a_terminal_has_columns_if_it_is_wide_enough(width: int, columns: bool, talking: Talking) -> None:
    seen = re.sub(r"\x1b\[[\d;]*m", "", talking(terminal=True, width=width)("/compare def main("))
    lines = [line for line in seen.splitlines() if "base" in line and "evolution" in line and "┃" in line]
    assert bool(lines) == columns
    assert all(len(line) <= width for line in seen.splitlines() if "│" in line)


def test_use_changes_who_answers(talking: Talking, lineup: Lineup) -> None:
    talk = talking()
    assert alone(lineup, "base", "def main(") in talk("/use base", "def main(")
    assert "--- base" in talk("/use base evolution", "def main(")
    assert "there is no model evolutoin; did you mean evolution?; there is base, foundation" in talk("/use evolutoin")


@pytest.mark.requirement("I-02")
def test_set_params_and_reset(talking: Talking) -> None:
    talk = talking()
    assert "temperature 0.5" in talk("/set temperature 0.5")
    assert "top_p: 2 is out of its range; a number from 0.01 to 1" in talk("/set top_p 2")
    assert talk.conversation.settings == Settings(temperature=0.5, max_tokens=12)
    params = talk("/params")
    assert "temperature 0.5" in params and all(name in params for name in LIMITS)
    talk("def main(", "/reset")
    assert talk.conversation.settings == SHORT and talk.conversation.turns == []
    assert "/set takes a name and a value" in talk("/set temperature")


@pytest.mark.requirement("I-02")
@pytest.mark.parametrize("word", ["/quit", "/exit", "quit", "exit", "q"])
def test_leaving(word: str, talking: Talking) -> None:
    talk = talking()
    assert talk(word, "def main(") == ""
    assert talk.conversation.turns == []
    talk("quite", "def main(")
    assert len(talk.conversation.turns) == 2, "other words are prompts"


def test_a_command_that_is_none_is_told_and_code_that_begins_with_a_slash_is_a_prompt(talking: Talking) -> None:
    talk = talking()
    assert "there is no command /comapre; did you mean /compare?" in talk("/comapre x")
    assert talk.conversation.turns == []
    talk("// a comment", "/* another */", " /usr/bin/env", "", "   ")
    assert [turn.prompt for turn in talk.conversation.turns] == ["// a comment", "/* another */", " /usr/bin/env"]


def test_help_names_every_command(talking: Talking) -> None:
    seen = talking()("/help")
    assert all(f"/{name}" in seen for name in COMMANDS)


def test_in_chat_mode_each_model_sees_its_own_answers(talking: Talking, lineup: Lineup) -> None:
    talk = talking()
    assert "the conversation is kept" in talk("/mode chat")
    talk("one", "/compare", "two")
    first, second = talk.conversation.turns
    assert set(first.answers) == {"base", "evolution"} and set(second.answers) == {"evolution"}
    assert first.answers["base"] != first.answers["evolution"]
    assert "/mode takes chat or plain; it is chat" in talk("/mode loud")


def test_what_a_model_says_is_shown_and_not_obeyed(talking: Talking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "phased_cpt.chat.answer.decoded", lambda tokenizer, ids, ends: "[red]x[/red]\x1b[31m" * len(ids)
    )
    for lines in (["a prompt"], ["/compare a prompt"]):
        seen = talking()(*lines)
        assert "[red]x[/red][31m" in seen and "\x1b[31m" not in seen


def test_with_one_model_there_is_nothing_to_compare(talking: Talking, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talking()
    monkeypatch.setattr(talk.conversation.lineup, "names", ("merged_model",))
    assert "only merged_model is loaded, and there is nothing to compare it with" in talk("/compare def f")
