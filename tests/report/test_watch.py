"""`status --watch`: live in a terminal, lines in a pipe, and it ends by itself."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from phased_cpt.ledger import run_lock
from phased_cpt.pulse import Beating
from phased_cpt.report.watch import line_of, newest, screen_of
from phased_cpt.run_dir import RunDir
from phased_cpt.tables import shown
from tests.conftest import Call
from tests.report.folders import FORGETTING, evaluation, folder, phase, record, step, two_phases

SECONDS = 20


def under_way(root: Path) -> RunDir:
    return folder(
        root,
        {
            "run.json": record(phase(1, "foundation", "running"), phase(2, "evolution", "pending", started=None)),
            "phase1_foundation/logs/train.jsonl": [step(1, 3.5, 241), step(2, 3.4, 242)],
            "phase1_foundation/logs/eval.jsonl": [evaluation(0, 3.6), evaluation(2, 3.3)],
            "forgetting.json": FORGETTING,
        },
    )


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[pexpect.spawn]:
    run = under_way(tmp_path / "run")
    with run_lock(run):
        arguments = ["-m", "phased_cpt", "status", "--watch", "--run-dir", str(run.root)]
        child = pexpect.spawn(sys.executable, arguments, timeout=SECONDS, dimensions=(50, 200), encoding="utf-8")
        child.expect("2 of 4")
        yield child
        child.close(force=True)


# What is shown --------------------------------------------------------------------------------------------------------


def test_the_screen_shows_where_the_run_is(tmp_path: Path) -> None:
    run = under_way(tmp_path)
    with run_lock(run):
        beating = Beating(tmp_path / "phase1_foundation" / "logs", 0)
        beating.beat("forward", 2)
        text = shown(screen_of(newest(run)))
        beating.close()
    for expected in (
        "tales: running (process", "loss 3.400, lr 1e-3, 50 tokens/s, 0:00:10 left (0:00:30 of the curriculum)",
        "held-out loss 3.300 of foundation at step 2 · step 2, forward (0 s ago)", "foundation                2.900      3.900      –",
    ):  # fmt: skip
        assert expected in text
    assert "s ago" not in shown(screen_of(newest(run)))  # nobody is at work any more


def test_the_screen_of_a_finished_run_shows_what_it_taught(tmp_path: Path) -> None:
    text = shown(screen_of(newest(two_phases(tmp_path))))
    assert "4 of 4  held-out loss 3.200 → 2.900" in text
    assert "tales: finished" in text


def test_a_damaged_folder_is_watched_all_the_same(tmp_path: Path) -> None:
    damaged = {"forgetting.json": {"sets": 3, "rows": "x"}, "phase1_foundation/best_adapter/source.json": "{"}
    text = shown(screen_of(newest(two_phases(tmp_path, **damaged))))
    assert "best_adapter/source.json: damaged" in text
    assert "held-out loss after" in shown(screen_of(newest(two_phases(tmp_path / "whole"))))
    assert "held-out loss after" not in text


def test_a_line_says_it_where_there_is_no_terminal(tmp_path: Path) -> None:
    with run_lock(run := under_way(tmp_path)):
        line = line_of(newest(run))
    assert line.startswith("tales: running, phase 1/2 foundation: step 2 of 4, loss 3.400, lr 1e-3, 50 tokens/s,")
    assert line_of(newest(run)).startswith("tales: interrupted, phase 1/2 foundation: step 2 of 4")


# The verb -------------------------------------------------------------------------------------------------------------


def test_nobody_at_work_is_told_once_and_that_is_the_end(tmp_path: Path, call: Call) -> None:
    answer = call("status", "--watch", "--run-dir", str(two_phases(tmp_path).root))
    assert (answer.code, answer.out, answer.err) == (0, "tales: finished\n", "")


def test_watching_and_json_do_not_go_together(tmp_path: Path, call: Call) -> None:
    run = str(two_phases(tmp_path).root)
    answer = call("status", "--watch", "--json", "--run-dir", run)
    assert (answer.code, answer.out) == (2, "")
    assert "--watch goes on and on, and --json prints facts once; leave one of them out" in answer.err
    assert call("status", "--json", "--run-dir", run).code == 0
    assert "no such run folder" in call("status", "--watch", "--run-dir", "nowhere").err


def test_it_goes_along_with_the_run_and_ends_with_it(tmp_path: Path) -> None:
    run = under_way(tmp_path / "run")
    log = run.root / "phase1_foundation" / "logs" / "train.jsonl"
    with run_lock(run):
        arguments = ["-m", "phased_cpt", "status", "--watch", "--run-dir", str(run.root)]
        child = pexpect.spawn(sys.executable, arguments, timeout=SECONDS, dimensions=(50, 200), encoding="utf-8")
        child.expect("2 of 4")
        with log.open("a") as file:
            file.write(json.dumps(step(3, 3.25, 243)) + "\n")
        child.expect("3 of 4.*loss 3.250")
        run.ledger.write_text(json.dumps(record(phase(1, "foundation"), phase(2, "evolution"))))
    child.expect("finished")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_leaves_and_the_cursor_is_there(terminal: pexpect.spawn) -> None:
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, terminal.signalstatus) == (0, None)
    assert "Traceback" not in (terminal.before or "")


def test_a_reader_that_leaves_is_no_reason_to_complain(tmp_path: Path) -> None:
    run = under_way(tmp_path)
    with run_lock(run):
        typed = shlex.join([sys.executable, "-m", "phased_cpt", "status", "--watch", "--run-dir", str(run.root)])
        command = f"{typed} | head -n 0; exit ${{PIPESTATUS[0]}}"
        child = pexpect.spawn("bash", ["-c", command], timeout=SECONDS, encoding="utf-8", env=dict(os.environ))
        time.sleep(0.1)
        index = child.expect([pexpect.EOF, "Traceback"], timeout=SECONDS)
        child.close()
    assert (index, child.exitstatus) == (0, 0)
