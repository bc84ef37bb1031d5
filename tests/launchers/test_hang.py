"""Who is stalled, by signs that stand on the page; and the watchdog of a rank that nobody watches."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from phased_cpt.launchers import hang
from phased_cpt.launchers.hang import Patience, stalled
from phased_cpt.pulse import Pulse
from tests.launchers.programs import Jobs, is_gone_soon, pid_of


def sign(rank: int, at: float, doing: str = "training", step: int = 7) -> Pulse:
    return Pulse(rank, 1000 + rank, "here", doing, step, at)


def runs(pid: int) -> str:
    return "S"


def test_nobody_is_stalled_while_one_gives_signs() -> None:
    signs = {0: sign(0, 10.0), 1: sign(1, 95.0)}
    assert stalled(signs, 0.0, 60.0, 100.0, runs) is None
    assert stalled(signs, 0.0, 60.0, 155.0, runs) is None
    assert stalled(signs, 0.0, 60.0, 156.0, runs) is not None, "the control"


def test_since_counts_as_a_sign() -> None:
    """The start of the job, or the last sign of a rank that has ended."""
    assert stalled({}, 50.0, 60.0, 100.0, runs) is None
    assert "no rank has come so far" in (stalled({}, 30.0, 60.0, 100.0, runs) or "")


def test_a_sign_of_before_the_machine_was_started_anew_does_not_count() -> None:
    assert stalled({0: sign(0, 9e6)}, 0.0, 60.0, 100.0, runs) is not None


STATES = {"": "gone", "T": "stopped by a signal", "t": "held by a debugger", "D": "waits for a disk or a device"}


@pytest.mark.parametrize("letter", STATES)
def test_what_the_system_says_makes_a_suspect(letter: str) -> None:
    signs = {0: sign(0, 10.0), 1: sign(1, 11.0, "saving", 6)}
    lines = (stalled(signs, 0.0, 60.0, 100.0, lambda pid: letter if pid == 1001 else "S") or "").splitlines()
    assert lines[1].startswith("    rank 1: saving, step 6; its last sign was 89 s ago; ")
    assert STATES[letter] in lines[1]
    assert lines[2] == "    rank 0: training, step 7; its last sign was 90 s ago"
    quiet = (stalled(signs, 0.0, 60.0, 100.0, runs) or "").splitlines()
    assert quiet[1].startswith("    rank 0"), "the control: else whoever was silent first"


def test_who_was_frozen_itself_does_not_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 5000.0, 5001.0, 5020.0, 5040.0, 5060.0, 5061.0])
    monkeypatch.setattr(hang.time, "monotonic", lambda: next(clock))
    patience = Patience(60.0)
    signs = {0: sign(0, 90.0)}
    assert [patience.lost(signs) is None for _ in range(7)] == [True] * 6 + [False]


# In a rank of the second door -------------------------------------------------------------------------------------------

WATCHED = """
from phased_cpt.launchers.hang import Watchdog
from phased_cpt.pulse import Beating
beating = Beating(logs, {rank})
wait("both") if {rank} else None
with Watchdog(logs, {rank}, {patience}):
    say("watched-{rank}")
    for _ in range({beats}):
        beating.beat("training", 3); sleep(0.1)
    {then}
say("ended-{rank}")
sleep({after})
"""
STANDS_STILL = "def stands_still(): sleep(60)\n    stands_still()"


def started(job: Jobs, rank: int, **what: object) -> subprocess.Popen[str]:
    job.logs.mkdir(exist_ok=True)
    does = WATCHED.format(rank=rank, **({"patience": 1.0, "beats": 1, "then": "pass", "after": 0} | what))
    return subprocess.Popen(job.words(f"{rank}.pid", does), stderr=subprocess.PIPE, text=True)


def test_a_rank_that_stands_still_tells_where_and_leaves(job: Jobs, tmp_path: Path) -> None:
    rank = started(job, 0, then=STANDS_STILL)
    said = rank.communicate(timeout=30)[1]
    assert rank.returncode == 1
    assert "rank 0: training, step 3" in said
    assert f"{job.logs}/stacks-<rank>.txt" in said
    assert "in stands_still" in (job.logs / "stacks-0.txt").read_text()


def test_a_rank_that_works_is_left_alone_and_so_is_what_comes_after(job: Jobs, tmp_path: Path) -> None:
    rank = started(job, 0, beats=25, after=2.5)
    assert rank.communicate(timeout=30)[1] == ""
    assert rank.returncode == 0
    assert not (job.logs / "stacks-0.txt").exists()


def test_of_two_one_that_was_stopped_is_named_by_the_other_and_killed_where_no_launcher_would(
    job: Jobs, tmp_path: Path
) -> None:
    orphans = "subprocess.Popen({0}, stderr=open(here / 'said', 'w')); subprocess.Popen({1}); wait('both')"
    does = [WATCHED.format(rank=rank, patience=2.0, beats=5, then="sleep(60)", after=0) for rank in (0, 1)]
    words = [job.words(f"{rank}.pid", text) for rank, text in enumerate(does)]
    job.logs.mkdir()
    launcher = subprocess.Popen(job.words("launcher.pid", orphans.format(*words)))
    pid_of(tmp_path / "watched-0")
    pid_of(tmp_path / "1.pid")
    (tmp_path / "both").write_text("1")
    stopped = pid_of(tmp_path / "watched-1")
    os.kill(stopped, signal.SIGSTOP)
    launcher.wait(20)
    assert is_gone_soon(pid_of(tmp_path / "0.pid"), 30)
    assert is_gone_soon(stopped)
    first = (tmp_path / "said").read_text().splitlines()[1]
    assert first.startswith("    rank 1: ")
    assert first.endswith("stopped by a signal")


def test_signs_of_an_earlier_attempt_are_forgotten(job: Jobs, tmp_path: Path) -> None:
    job.logs.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    old = f'{{"rank": 3, "pid": {gone.pid}, "host": "{os.uname().nodename}", "doing": "x", "step": 1, "at": 1.0}}'
    (job.logs / "pulse-3.json").write_text(old)
    started(job, 0, beats=1).wait(20)
    assert not (job.logs / "pulse-3.json").exists()
    assert (job.logs / "pulse-0.json").exists(), "the control"
