"""Processes that are started, watched and ended. They are small programs here; journeys/ has real ranks."""

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from phased_cpt.errors import Interrupted, PhasedCptError
from phased_cpt.launchers import Command, start
from phased_cpt.stopping import Asked, Stopping
from tests.launchers.programs import (
    ENDS_WELL,
    FAILS,
    HAS_A_RANK,
    IGNORES_SIGTERM,
    IS_KILLED,
    SLEEPS,
    Jobs,
    asks,
    is_alive,
    is_gone_soon,
    pid_of,
)


def launched(commands: Sequence[Command], logs: Path) -> None:
    """By a conductor of whom nothing is asked."""
    start.launched(commands, logs, Stopping(), math.inf)


def test_a_job_whose_processes_end_well_is_done(job: Jobs, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/failed-1.json").write_text("of an earlier attempt")
    launched(job(ENDS_WELL, "print('hello')"), tmp_path / "logs")
    assert (tmp_path / "logs/rank1.log").read_text() == "hello\n"


def test_when_one_fails_the_others_are_ended_and_it_is_told_which_and_where_its_log_is(
    job: Jobs, tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(PhasedCptError) as failure:
        launched(job(SLEEPS, "wait('0.pid'); print('one\\ntwo'); " + FAILS), tmp_path / "logs")
    assert time.monotonic() - began < 5
    log = tmp_path / "logs/rank1.log"
    assert (
        str(failure.value)
        == f"rank 1 ended with exit code 1; its output is in {log}\n    one\n    two\n    no such GPU"
    )
    assert failure.value.exit_code == 1
    assert not is_alive(pid_of(tmp_path / "0.pid")), "which would have slept for a minute"


def test_of_a_rank_that_was_killed_the_others_say_that_it_is_gone_and_it_is_told_all_the_same(
    job: Jobs, tmp_path: Path
) -> None:
    """The usual end of a job that runs out of memory."""
    follows = "pid = (wait('1.pid'), int((here / '1.pid').read_text()))[1]\nsay('other')\n"
    follows += "while open(f'/proc/{pid}/stat').read().split()[2] != 'Z': sleep(0.01)\n"
    follows += "word(0, 1, 'RuntimeError: Connection closed by peer'); sys.exit(1)"
    with pytest.raises(
        PhasedCptError, match=r"^rank 1 was ended by SIGKILL, as the system does when memory runs out; .*rank1.log"
    ):
        launched(job(follows, IS_KILLED), tmp_path / "logs")
    with pytest.raises(PhasedCptError, match=r"^RuntimeError: Connection closed by peer$"):  # the control
        launched(job("word(0, 1, 'RuntimeError: Connection closed by peer'); sys.exit(1)", SLEEPS), tmp_path / "logs")


def test_a_rank_that_leaves_word_is_believed_with_its_exit_code(job: Jobs, tmp_path: Path) -> None:
    """What the user can mend comes before what follows from it, however the processes ended."""
    diverged = "word(0, 5, 'step 3: the loss is not finite'); sys.exit(5)"
    after = "wait('logs/failed-0.json'); word(1, 1, 'RuntimeError: gloo'); sys.exit(1)"
    with pytest.raises(PhasedCptError, match=r"^step 3: the loss is not finite$") as failure:
        launched(job(diverged, after), tmp_path / "logs")
    assert failure.value.exit_code == 5


@pytest.mark.parametrize("code, said", [(1, "ended with exit code 1;"), (247, "exit code 247: a rank was ended by SIGKILL"),
                                        (139, "exit code 139: a rank was ended by SIGSEGV;"), (255, "ended with exit code 255;")])  # fmt: skip
def test_the_exit_code_of_a_launcher_is_read(code: int, said: str, job: Jobs, tmp_path: Path) -> None:
    with pytest.raises(PhasedCptError) as failure:
        launched(job(f"sys.exit({code})"), tmp_path / "logs")
    assert said in str(failure.value)


def test_a_process_that_ignores_sigterm_is_killed(job: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "GRACE_SECONDS", 0.3)
    with pytest.raises(PhasedCptError, match="rank 1 ended with exit code 1"):
        launched(job(IGNORES_SIGTERM, "wait('other'); sys.exit(1)"), tmp_path / "logs")
    assert not is_alive(pid_of(tmp_path / "0.pid"))


def test_the_ranks_of_a_launcher_that_was_killed_are_ended(job: Jobs, tmp_path: Path) -> None:
    says = HAS_A_RANK.replace("subprocess.Popen", "rank = subprocess.Popen").replace(
        "; os.kill", "; (here / 'rank').write_text(str(rank.pid)); os.kill"
    )
    with pytest.raises(PhasedCptError, match="rank 0 was ended by SIGKILL"):
        launched(job(says), tmp_path / "logs")
    assert is_gone_soon(pid_of(tmp_path / "rank"))


# Signals to the conductor -----------------------------------------------------------------------------------------------

CONDUCTOR = """
import pickle, sys
from phased_cpt.errors import PhasedCptError
from phased_cpt.launchers import launched
from phased_cpt.stopping import heard
commands, logs = pickle.loads(bytes.fromhex({commands!r}))
try:
    with heard() as stop:
        launched(commands, logs, stop, 3600.0)
except PhasedCptError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def conductor(commands: Sequence[Command], logs: Path) -> subprocess.Popen[str]:
    program = CONDUCTOR.format(commands=pickle.dumps((list(commands), logs)).hex())
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda how: how.name)
def test_a_signal_to_the_conductor_is_a_stop_of_the_ranks(how: signal.Signals, job: Jobs, tmp_path: Path) -> None:
    process = conductor(job("train(0)", "train(1)"), job.logs)
    ranks = [pid_of(tmp_path / f"trains-{rank}") for rank in (0, 1)]
    time.sleep(0.3)
    assert all(map(is_alive, ranks))
    assert not list(tmp_path.glob("heard-*")), "the control: nobody has told them yet"
    process.send_signal(how)
    assert process.wait(20) == 75
    assert process.communicate()[0] == "stopped after step 7\n"
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM ", "SIGTERM "]
    assert not any(map(is_alive, ranks))


WATCHES = "from phased_cpt.launchers.parents import die_with_the_parent; die_with_the_parent(); say('watches'); "
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "


@pytest.mark.parametrize("behind_a_launcher", [False, True])
@pytest.mark.parametrize("way", ["killed", "asked twice"])
def test_when_the_conductor_goes_at_once_nobody_is_left(
    way: str, behind_a_launcher: bool, job: Jobs, tmp_path: Path
) -> None:
    rank = WATCHES + DEAF + "train(0, code=0, beats=False); sleep(60)"
    process = conductor([job.launcher(rank, session=True)] if behind_a_launcher else job(rank), job.logs)
    pids = [pid_of(tmp_path / name) for name in ["trains-0", "launcher.pid"][: 1 + behind_a_launcher]]
    assert all(map(is_alive, pids))
    if way == "killed":
        process.kill()
        assert process.wait(20) == -9
    else:
        process.terminate()
        while not (tmp_path / "heard-0").exists():
            time.sleep(0.01)
        time.sleep(1.2)
        assert all(map(is_alive, pids)), "the control: once is not twice"
        process.terminate()
        assert process.wait(20) == 75
    assert all(map(is_gone_soon, pids))


def test_a_job_is_not_started_when_a_stop_was_asked_before(job: Jobs, tmp_path: Path) -> None:
    stop = Stopping()
    with stop.held():
        stop.hear(signal.SIGTERM, None)
    with pytest.raises(Interrupted, match=r"stopped \(SIGTERM\)"):
        start.launched(job(SLEEPS), job.logs, stop, math.inf)
    assert not (tmp_path / "0.pid").exists()


def test_a_stop_ends_ranks_that_have_not_begun(job: Jobs, tmp_path: Path) -> None:
    """One has come to train, and waits for the other, which still imports: neither has anything to lose."""
    stop, began = Stopping(), time.monotonic()
    deaf = "from phased_cpt.pulse import Beating; Beating(logs, 0); " + DEAF + "say('deaf'); sleep(60)"
    asks(stop, signal.SIGTERM, tmp_path / "1.pid", tmp_path / "deaf")
    with pytest.raises(Interrupted, match=r"^stopped \(SIGTERM\) before anything was trained in this call; the same"):
        start.launched(job(deaf, SLEEPS), job.logs, stop, math.inf)
    assert time.monotonic() - began < 10
    assert not any(is_alive(pid_of(tmp_path / f"{rank}.pid")) for rank in (0, 1))


def test_the_ears_are_open_again_after_a_job(job: Jobs) -> None:
    stop = Stopping()
    start.launched(job(ENDS_WELL), job.logs, stop, math.inf)
    with pytest.raises(Asked):
        stop.hear(signal.SIGTERM, None)


def test_every_rank_is_told_who_conducts(job: Jobs, tmp_path: Path) -> None:
    launched(job("(here / 'who').write_text(os.environ['PHASED_CPT_CONDUCTOR'])"), tmp_path / "logs")
    assert (tmp_path / "who").read_text() == str(os.getpid())


def test_the_pulse_of_an_earlier_attempt_is_nobodys(job: Jobs, tmp_path: Path) -> None:
    """Its process id may be anybody's by now."""
    other = subprocess.Popen([sys.executable, "-Sc", "import time; time.sleep(60)"])
    job.logs.mkdir()
    word = '{{"rank": {0}, "pid": {1}, "host": "{2}", "doing": "x", "step": 1, "at": 1.0}}'
    (job.logs / "pulse-3.json").write_text(word.format(3, other.pid, os.uname().nodename))
    late = f"(logs / 'pulse-2.json').write_text({word.format(2, other.pid, os.uname().nodename)!r}); train(0)"
    stop = Stopping()
    asks(stop, signal.SIGTERM, tmp_path / "trains-0")
    with pytest.raises(Interrupted, match="after step 7"):
        start.launched(job(late), job.logs, stop, math.inf)
    assert not (job.logs / "pulse-3.json").exists()
    assert (job.logs / "pulse-2.json").exists(), "the control: one that looks like a rank of this job"
    assert other.poll() is None
    other.kill()
    other.wait()
