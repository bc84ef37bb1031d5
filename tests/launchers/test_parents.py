"""A rank whose launcher dies does not train on, unseen: by small programs in the place of launchers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.programs import Jobs, is_alive, is_gone_soon, pid_of

# A rank of the second door, which seals a checkpoint when it is told; `above` starts what is below it, and waits.
RANK = """
from phased_cpt.launchers import parents
parents.ORPHAN_SECONDS = {bound}
def stops(number, frame): say("sealed"); (os._exit(75) if {leaves} else None)
signal.signal(signal.SIGTERM, stops)
parents.die_with_the_parent()
say("trains")
for _ in range(600): sleep(0.1)
"""
ABOVE = "subprocess.Popen({below!r}).wait()"


def launch(job: Jobs, rank: str, *more: str) -> list[str]:
    return job.words("launcher.pid", ABOVE.format(below=job.words("rank.pid", rank)), *more)


def rank(leaves: bool = True, bound: float = 600.0) -> str:
    return RANK.format(leaves=leaves, bound=bound)


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PHASED_CPT_")}
    return kept | more


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
def test_a_rank_of_the_second_door_stops_when_its_launcher_dies(how: signal.Signals, job: Jobs, tmp_path: Path) -> None:
    launcher = subprocess.Popen(launch(job, rank()), env=environment())
    pid = pid_of(tmp_path / "trains")
    assert is_alive(pid)
    assert not (tmp_path / "sealed").exists(), "the control: while the launcher lives"
    launcher.send_signal(how)
    launcher.wait()
    assert is_gone_soon(pid)
    assert (tmp_path / "sealed").exists()


def test_a_rank_of_the_first_door_dies_with_its_launcher(job: Jobs, tmp_path: Path) -> None:
    """The conductor tells of it, and nothing of the job may be left when it starts the next."""
    launcher = subprocess.Popen(launch(job, rank()), env=environment(PHASED_CPT_CONDUCTOR=str(os.getpid())))
    pid = pid_of(tmp_path / "trains")
    launcher.kill()
    launcher.wait()
    assert is_gone_soon(pid)
    assert not (tmp_path / "sealed").exists()


def test_an_orphan_that_does_not_stop_is_ended_in_the_end(job: Jobs, tmp_path: Path) -> None:
    launcher = subprocess.Popen(launch(job, rank(leaves=False, bound=1.0)), env=environment())
    pid = pid_of(tmp_path / "trains")
    launcher.kill()
    launcher.wait()
    pid_of(tmp_path / "sealed")
    assert is_alive(pid), "the control: it does not end by itself"
    assert is_gone_soon(pid)


CALLED = {
    "deepspeed": (["deepspeed", "--num_gpus=2", "--module", "phased_cpt"], "deepspeed.launcher.launch", True),
    "the module of deepspeed": (["-m", "deepspeed.launcher.runner"], "deepspeed.launcher.launch", True),
    "another program": (["train-all.py", "deepspeed.yaml"], "deepspeed.launcher.launch", False),
    "deepspeed over something else": (["deepspeed", "train.py"], "train.py", False),
}


@pytest.mark.parametrize("which", CALLED)
def test_a_rank_stops_when_deepspeed_dies_over_its_launcher(which: str, job: Jobs, tmp_path: Path) -> None:
    """And with nothing else that stands there: a terminal that was closed over nohup, say."""
    words, launcher, stops = CALLED[which]
    above = job.words("above.pid", ABOVE.format(below=launch(job, rank(), launcher)))
    name = words[0] if words[0] != "-m" else "runner"
    (tmp_path / name).write_text(above[2])  # a file, for its name is what is looked at
    called = [sys.executable, str(tmp_path / name), *(words[1:] if words[0] != "-m" else words)]
    program = subprocess.Popen(called, env=environment())
    pid = pid_of(tmp_path / "trains")
    program.terminate()
    program.wait()
    assert is_gone_soon(pid, 10.0 if stops else 0.7) == stops
    assert (tmp_path / "sealed").exists() == stops
    if not stops:
        os.kill(pid, signal.SIGKILL)
    assert is_gone_soon(pid_of(tmp_path / "launcher.pid"))


def test_a_rank_stops_when_the_guard_dies(job: Jobs, tmp_path: Path) -> None:
    guard = subprocess.Popen([sys.executable, "-Sc", "import time; time.sleep(60)"])
    mark = f"{os.uname().nodename}:{guard.pid}"
    launcher = subprocess.Popen(launch(job, rank()), env=environment(PHASED_CPT_GUARD=mark))
    pid = pid_of(tmp_path / "trains")
    assert is_alive(pid)
    guard.kill()
    guard.wait()
    assert is_gone_soon(pid)
    assert (tmp_path / "sealed").exists()
    launcher.wait()


@pytest.mark.parametrize("host, begins", [(os.uname().nodename, False), ("another-host", True)])
def test_a_rank_that_comes_after_the_end_of_its_guard_leaves(
    host: str, begins: bool, job: Jobs, tmp_path: Path
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    launcher = subprocess.Popen(launch(job, rank()), env=environment(PHASED_CPT_GUARD=f"{host}:{gone.pid}"))
    if begins:
        pid_of(tmp_path / "trains")
        launcher.kill()
    launcher.wait(20)
    assert (tmp_path / "trains").exists() == begins
    assert is_gone_soon(pid_of(tmp_path / "rank.pid"))


def test_the_launcher_is_watched_before_the_imports(job: Jobs, tmp_path: Path) -> None:
    imports = "from phased_cpt.launchers import before_the_imports\nbefore_the_imports()\nsay('imports')\nsleep(60)"
    launcher = subprocess.Popen(launch(job, imports), env=environment(RANK="0"))
    pid = pid_of(tmp_path / "imports")
    assert is_alive(pid)
    launcher.kill()
    launcher.wait()
    assert is_gone_soon(pid)
