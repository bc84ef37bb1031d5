"""`phased-cpt chat` as it is typed: in a terminal, in a pipe, with a file of prompts."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest
from rich.console import Console

from phased_cpt.chat import main
from phased_cpt.chat.batch import read_prompts
from phased_cpt.chat.conversation import typed
from phased_cpt.chat.screen import Screen
from phased_cpt.errors import InputError
from phased_cpt.wanted import ChatWanted, ModelsWanted
from tests.conftest import Write

COMMAND = [sys.executable, "-m", "phased_cpt", "chat"]
STARTS_SECONDS, ANSWERS_SECONDS = 60, 30
QUIET = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def terminal(run: Path) -> "pexpect.spawn[str]":
    """The verb in a terminal of 80 columns, ready for a prompt; the newest run of outputs/ is found by itself."""
    (run.parent / "outputs").mkdir(exist_ok=True)
    newest = run.parent / "outputs" / "tiny-20260102_030405"
    if not newest.exists():
        newest.symlink_to(run)
    environment = {**QUIET, "TERM": "xterm", "PYTHONPATH": str(Path.cwd())}
    child = pexpect.spawn(COMMAND[0], [*COMMAND[1:], "--plain"], cwd=str(run.parent), env=environment, encoding="utf-8", dimensions=(40, 80), timeout=ANSWERS_SECONDS)  # fmt: skip
    child.expect_exact("base, foundation, evolution;", timeout=STARTS_SECONDS)
    child.expect("\r\n> ")
    return child


@pytest.mark.requirement("I-01", "I-02", "I-03")
def test_a_conversation_in_a_terminal(terminal: "pexpect.spawn[str]") -> None:
    def typed(line: str) -> str:
        terminal.sendline(line)
        terminal.expect(r"\n> $")
        return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", str(terminal.before))

    assert "temperature 0 " in typed("/set temperature 0")
    assert "out of its range" in typed("/set temperature 99")
    assert "max_tokens 20" in typed("/set max_tokens 20")
    assert re.search(r"\[20 tokens in [\d.]+ s, \d+ tokens/s; max_tokens\]", typed("def main("))
    compared = typed("/compare")
    assert re.search(r"┃ base +┃ evolution +┃", compared), compared

    typed("/set max_tokens 8000")
    terminal.sendline("def main(")
    terminal.expect(r"main\(\r\n.{40}")  # it is talking
    terminal.sendintr()
    terminal.expect(r"\[\d+ tokens in [^\]]+; stopped\]")
    terminal.expect("> $")
    terminal.sendline("/set max_tokens 5")
    terminal.expect(r"max_tokens 5 ")
    terminal.expect("> $")

    terminal.send("half a pro")
    terminal.expect_exact("half a pro")
    time.sleep(0.5)  # a Ctrl-C while readline takes in the letters shows only at the next key: CPython's own race
    terminal.sendintr()
    terminal.expect_exact("Ctrl-C once more, Ctrl-D or /quit leaves")
    terminal.expect("> $")
    terminal.sendline("/quit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert "Traceback" not in str(terminal.before)


@pytest.mark.parametrize(
    "keys, lines",
    [
        (["one", EOFError, "two"], ["one"]),
        (["one", KeyboardInterrupt, KeyboardInterrupt, "two"], ["one"]),
        (["one", KeyboardInterrupt, "two", KeyboardInterrupt, "three", EOFError], ["one", "two", "three"]),
    ],
    ids=["Ctrl-D", "Ctrl-C twice", "Ctrl-C now and then"],
)
def test_ctrl_d_leaves_and_so_does_the_second_ctrl_c_in_a_row(
    keys: list[Any], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pressed = iter(keys)

    def next_key(prompt: str) -> str:
        key = next(pressed)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", next_key)
    seen = Console(file=io.StringIO())
    assert list(typed(Screen(seen, seen))) == lines


def chat(run: Path, *more: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--run-dir", str(run), *more]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=STARTS_SECONDS, env=QUIET)


def test_prompts_in_a_pipe_are_answered_and_nothing_else_is_on_stdout(run: Path) -> None:
    answer = chat(
        run, "--max-tokens", "5", "--temperature", "0", stdin="/mode plain\ndef main(\n/nonsense\ndef other(\n"
    )
    assert answer.returncode == 0
    assert "loading" in answer.stderr and "5 tokens" in answer.stderr and "no command /nonsense" in answer.stderr
    assert answer.stdout.strip() and not re.search("loading|tokens/s|command|Warning", answer.stdout)
    assert "Traceback" not in answer.stderr and "Warning" not in answer.stderr and "it/s" not in answer.stderr


def asked(run: Path, prompts: Path, capsys: pytest.CaptureFixture[str], **more: object) -> dict[str, Any]:
    models = ModelsWanted(run_dir=run, device="cpu")
    assert main(ChatWanted(models, prompts, True, max_tokens=6, plain=True, **more)) == 0  # type: ignore[arg-type]
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.requirement("I-03")
def test_a_file_of_prompts_as_json(run: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write('{"prompt": "def main("}\n\n{"prompt": "two\\nlines", "id": 7}\n', "prompts.jsonl")
    found = asked(run, prompts, capsys)
    assert (found["names"], found["mode"]) == (["base", "evolution"], "plain")
    first, second = found["answers"]
    assert (first["prompt"], second["prompt"]) == ("def main(", "two\nlines")
    assert list(first["answers"]) == ["base", "evolution"]
    base, tuned = first["answers"].values()
    assert set(base) == {"text", "tokens", "seconds", "ended", "tokens_per_second"} and base["tokens"] == 6
    assert base["text"] != tuned["text"]

    def texts(found: dict[str, Any]) -> list[str]:
        return [answer["text"] for each in found["answers"] for answer in each["answers"].values()]

    assert texts(asked(run, prompts, capsys)) == texts(found), "the same file is answered the same"
    warm = asked(run, prompts, capsys, temperature=1.5, seed=1, compare=("foundation",))
    other = asked(run, prompts, capsys, temperature=1.5, seed=2, compare=("foundation",))
    assert warm["names"] == ["foundation"] and texts(warm) != texts(other)


def test_a_file_of_prompts_to_be_read(run: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    models = ModelsWanted(run_dir=run, device="cpu")
    wanted = ChatWanted(
        models, write("def main(\r\n\nclass A:\n", "prompts.txt"), compare=("foundation",), max_tokens=4
    )
    assert main(wanted) == 0
    seen = capsys.readouterr().out
    assert "> def main(\n--- foundation: 4 tokens" in seen and "> class A:\n--- foundation" in seen


@pytest.mark.parametrize(
    "content, name, problem",
    [
        (
            '{"prompt": "a"}\n{"question": "b"}\n',
            "p.jsonl",
            "p.jsonl:2: no `prompt` with text in it; one object a line",
        ),
        ('{"prompt": "a"}\n\n{"prompt": \n', "p.jsonl", "p.jsonl:3: no JSON: Expecting value"),
        ('"a"\n', "p.jsonl", "p.jsonl:1: no `prompt` with text in it"),
        ("\n \n", "p.txt", "p.txt: there is no prompt in it"),
        (b"\xff\xfe", "p.txt", "p.txt: this is no UTF-8"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(content: str | bytes, name: str, problem: str, write: Write) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        read_prompts(write(content, name))


@pytest.mark.parametrize(
    "wanted, problem",
    [
        (
            {"compare": ("evolutoin",)},
            "there is no model evolutoin; did you mean evolution?; there is base, foundation",
        ),
        ({"as_json": True}, "--json goes with --prompts FILE"),
        ({"prompts": Path("none")}, "--prompts none: cannot be read: No such file or directory"),
        ({"temperature": 9.0}, "temperature: 9.0 is out of its range; a number from 0 to 5"),
    ],
)
def test_what_cannot_be_asked_is_refused(wanted: dict[str, Any], problem: str, run: Path) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        main(ChatWanted(ModelsWanted(run_dir=run, device="cpu"), **wanted))
