"""Processes that are started, watched and ended. They are small programs here; journeys/ has real ranks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phased_cpt.errors import PhasedCptError
from phased_cpt.launchers import Command, launched, start

# Each says its process id, and then …
SLEEPS = "sleep(60)"
ENDS_WELL = "pass"
FAILS = "sys.exit('no such GPU')"
IS_KILLED = "wait('other'); os.kill(os.getpid(), signal.SIGKILL)"
IGNORES_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('other'); sleep(60)"
HAS_A_RANK = (
    "subprocess.Popen([sys.executable, '-Sc', 'import time; time.sleep(60)']); os.kill(os.getpid(), signal.SIGKILL)"
)

PROGRAM = """
import json, os, signal, subprocess, sys
from pathlib import Path
from time import sleep
here, logs = Path({here!r}), Path({logs!r})
def say(name): (here / name).write_text(str(os.getpid()))
def wait(name):
    while not (here / name).exists(): sleep(0.01)
def word(rank, code, message): (logs / f"failed-{{rank}}.json").write_text(json.dumps({{"exit_code": code, "message": message, "rank": rank}}))
say({name!r})
{does}
"""

Job = Callable[..., list[Command]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Ranks that do what is said; the first writes where we do, as ever."""

    def made(*what: str) -> list[Command]:
        logs = tmp_path / "logs"
        return [
            Command(
                f"rank {rank}",
                [
                    sys.executable,
                    "-Sc",
                    PROGRAM.format(here=str(tmp_path), logs=str(logs), name=f"{rank}.pid", does=does),
                ],
                log=logs / f"rank{rank}.log" if rank else None,
            )
            for rank, does in enumerate(what)
        ]

    return made


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pid_of(path: Path, patience: float = 10.0) -> int:
    deadline = time.monotonic() + patience
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} is not there"
        time.sleep(0.01)
    return int(path.read_text())


def is_gone_soon(pid: int, patience: float = 5.0) -> bool:
    deadline = time.monotonic() + patience
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_a_job_whose_processes_end_well_is_done(job: Job, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/failed-1.json").write_text("of an earlier attempt")
    launched(job(ENDS_WELL, "print('hello')"), tmp_path / "logs")
    assert (tmp_path / "logs/rank1.log").read_text() == "hello\n"


def test_when_one_fails_the_others_are_ended_and_it_is_told_which_and_where_its_log_is(
    job: Job, tmp_path: Path
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
    job: Job, tmp_path: Path
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


def test_a_rank_that_leaves_word_is_believed_with_its_exit_code(job: Job, tmp_path: Path) -> None:
    """What the user can mend comes before what follows from it, however the processes ended."""
    diverged = "word(0, 5, 'step 3: the loss is not finite'); sys.exit(5)"
    after = "wait('logs/failed-0.json'); word(1, 1, 'RuntimeError: gloo'); sys.exit(1)"
    with pytest.raises(PhasedCptError, match=r"^step 3: the loss is not finite$") as failure:
        launched(job(diverged, after), tmp_path / "logs")
    assert failure.value.exit_code == 5


@pytest.mark.parametrize("code, said", [(1, "ended with exit code 1;"), (247, "exit code 247: a rank was ended by SIGKILL"),
                                        (139, "exit code 139: a rank was ended by SIGSEGV;"), (255, "ended with exit code 255;")])  # fmt: skip
def test_the_exit_code_of_a_launcher_is_read(code: int, said: str, job: Job, tmp_path: Path) -> None:
    with pytest.raises(PhasedCptError) as failure:
        launched(job(f"sys.exit({code})"), tmp_path / "logs")
    assert said in str(failure.value)


def test_a_process_that_ignores_sigterm_is_killed(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "GRACE_SECONDS", 0.3)
    with pytest.raises(PhasedCptError, match="rank 1 ended with exit code 1"):
        launched(job(IGNORES_SIGTERM, "wait('other'); sys.exit(1)"), tmp_path / "logs")
    assert not is_alive(pid_of(tmp_path / "0.pid"))


def test_the_ranks_of_a_launcher_that_was_killed_are_ended(job: Job, tmp_path: Path) -> None:
    says = HAS_A_RANK.replace("subprocess.Popen", "rank = subprocess.Popen").replace(
        "; os.kill", "; (here / 'rank').write_text(str(rank.pid)); os.kill"
    )
    with pytest.raises(PhasedCptError, match="rank 0 was ended by SIGKILL"):
        launched(job(says), tmp_path / "logs")
    assert is_gone_soon(pid_of(tmp_path / "rank"))


# Signals to the conductor -----------------------------------------------------------------------------------------------

CONDUCTOR = """
import pickle, sys
from phased_cpt.launchers import launched
commands, logs = pickle.loads(bytes.fromhex({commands!r}))
try:
    launched(commands, logs)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_the_ranks_first(how: signal.Signals, code: int, job: Job, tmp_path: Path) -> None:
    import pickle

    pickled = pickle.dumps((job(SLEEPS, SLEEPS), tmp_path / "logs")).hex()
    conductor = subprocess.Popen([sys.executable, "-c", CONDUCTOR.format(commands=pickled)])
    ranks = [pid_of(tmp_path / f"{rank}.pid") for rank in (0, 1)]
    assert all(map(is_alive, ranks))
    conductor.send_signal(how)
    assert conductor.wait(10) == code
    assert not any(map(is_alive, ranks))


def test_sigterm_is_as_it_was_after_a_job(job: Job, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    launched(job(ENDS_WELL), tmp_path / "logs")
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_rank_is_told_who_conducts(job: Job, tmp_path: Path) -> None:
    launched(job("(here / 'who').write_text(os.environ['PHASED_CPT_CONDUCTOR'])"), tmp_path / "logs")
    assert (tmp_path / "who").read_text() == str(os.getpid())
