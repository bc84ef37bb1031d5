"""What is seen on stderr while a phase trains: a bar on a terminal, lines in a log."""

import fcntl
import math
import os
import pty
import re
import select
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.tracking import console
from phased_cpt.tracking.console import Log, open_console, plain
from tests.tracking.shapes import child, environment, evaluation, step, stretch

TRAINS = """
from phased_cpt.tracking import Sinks
from phased_cpt.tracking.console import open_console
with Sinks({"console": open_console(stretch(Path("/nowhere")))}) as sinks:
    sinks.evaluated(evaluation(0))
    for number in range(1, 21):
        sinks.train(step(number))
    sinks.evaluated(evaluation(20))
    sinks.tell("[red]a checkpoint was broken[/red]")
    print("printed by another library")
    ENDING
"""
SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"


def on_a_terminal(ending: str, columns: int = 150, **more: Any) -> tuple[str, int]:
    """What a terminal gets of a process that trains, and how that process ended."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    before = termios.tcgetattr(theirs)
    env = environment(TERM="xterm-256color")
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs} | more
    with child(TRAINS.replace("ENDING", ending), env=env, **ends) as process:
        seen = b""
        while process.poll() is None or _ready(ours):
            if _ready(ours):
                seen += os.read(ours, 65536)
        assert termios.tcgetattr(theirs) == before, "echo and line mode are as they were"
        code = process.returncode
    os.close(ours)
    os.close(theirs)
    return seen.decode(), code


def _ready(file: int) -> bool:
    return bool(select.select([file], [], [], 0.05)[0])


def text(seen: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)


def test_a_step_and_an_evaluation_as_text(tmp_path: Path) -> None:
    phase = stretch(tmp_path)
    assert plain(step(12), phase) == (
        "phase 2/3 evolution: step 12/40, loss 3.214, lr 9.1e-05, 1,234 tokens/s, ETA 0:01:20 (curriculum 0:05:02)"
    )
    assert plain(evaluation(20), phase) == (
        "phase 2/3 evolution: step 20, held-out loss 3.412, perplexity 30.3 (12,345 tokens of evolution)"
    )
    assert plain(step(13), phase) != plain(step(12), phase)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"loss": math.nan}, "loss nan,"),
        ({"loss": None}, "loss ?,"),
        ({"eta_seconds": None}, "ETA ? (curriculum 0:05:02)"),
        ({"curriculum_eta_seconds": math.inf}, "ETA 0:01:20 (curriculum ?)"),
        ({"curriculum_eta_seconds": 200000}, "(curriculum 2 days, 7:33:20)"),
        ({"tokens_per_second": math.nan}, "nan tokens/s"),
    ],
)
def test_a_step_with_odd_figures_is_still_told(changes: dict[str, Any], shown: str, tmp_path: Path) -> None:
    assert shown in plain(step(1, **changes), stretch(tmp_path))
    assert shown not in plain(step(1), stretch(tmp_path))


@pytest.mark.parametrize(
    ("perplexity", "shown"), [(None, "perplexity ? ("), (1.5e9, "perplexity 1.5e+09 ("), (12345.67, "12,345.7 (")]
)
def test_a_perplexity_of_any_size_is_told(perplexity: float | None, shown: str, tmp_path: Path) -> None:
    assert shown in plain(evaluation(1, perplexity=perplexity), stretch(tmp_path))
    assert shown not in plain(evaluation(1), stretch(tmp_path))


def test_in_a_log_stand_the_first_step_the_last_one_each_ten_seconds_and_every_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    sink = open_console(stretch(tmp_path, begin=5))
    assert isinstance(sink, Log)
    for number in range(6, 39):
        now += 0.6  # all 33 steps take 20 seconds, and the phase ends two steps early
        sink.train(step(number))
        if number in (7, 8):
            sink.evaluated(evaluation(number))
    sink.close()
    lines = [re.findall(r"step (\d+)(/?)", line)[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [("6", "/"), ("7", ""), ("8", ""), ("23", "/"), ("38", "/")]
    sink.close()
    assert capsys.readouterr().err == "", "each is told once"


def test_on_a_terminal_a_bar_moves_and_what_is_told_stays_above_it() -> None:
    seen, code = on_a_terminal("pass")
    assert code == 0
    lines = text(seen).splitlines()
    assert any(line.startswith("phase 2/3 evolution: step 20, held-out loss 3.412, perplexity 30.3") for line in lines)
    assert "[red]a checkpoint was broken[/red]" in lines, "as it is, whatever it looks like"
    assert "printed by another library" in lines
    bar = [line for line in lines if line.startswith("phase 2/3 evolution 20/40 ━")][-1]
    assert bar.rstrip().endswith("loss 3.214, lr 9.1e-05, 1,234 tokens/s, ETA 0:01:20 (curriculum 0:05:02)")
    assert "20/40 ━" not in text(on_a_terminal("pass", stderr=subprocess.DEVNULL)[0]), (
        "no bar where stderr is no terminal"
    )


def test_on_a_narrow_terminal_the_figures_are_folded_and_not_cut() -> None:
    seen = text(on_a_terminal("pass", columns=80)[0])
    assert "…" not in seen
    assert all(word in seen for word in ("20/40", "loss 3.214", "tokens/s", "(curriculum"))
    assert max(map(len, seen.splitlines()[-3:])) <= 80


def test_stdout_that_is_no_terminal_gets_what_is_printed_there(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        seen, _ = on_a_terminal("pass", stdout=out)
    assert (tmp_path / "out").read_text() == "printed by another library\n"
    assert "printed by another library" not in seen


@pytest.mark.parametrize(
    ("ending", "code"),
    [("pass", 0), ("raise ValueError", 1), ("raise KeyboardInterrupt", -2), ("import os; os.kill(os.getpid(), 9)", -9)],
)
def test_however_it_ends_the_terminal_is_left_usable(ending: str, code: int) -> None:
    seen, returned = on_a_terminal(ending)
    assert returned == code
    assert HIDDEN in seen, "rich hides the cursor"
    assert seen.rindex(SHOWN) > seen.rindex(HIDDEN)
