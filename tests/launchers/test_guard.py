"""launch/bin/deepspeed over a deepspeed, a launch.py and ranks that are small programs: signals stop the ranks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY
from tests.launchers.programs import Jobs, is_alive, is_gone_soon, pid_of

SHIM = REPOSITORY / "launch/bin/deepspeed"
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]

# As DeepSpeed's own: runner.py passes on the code of launch.py, if there is one; signals end it alone.
RUNNER = """
launcher = subprocess.Popen({launcher!r})
launcher.wait()
sys.exit(max(launcher.returncode, 0))
"""
# SIGTERM is passed on by launch.py, and it ends with code 1; else it ends with the first rank that fails.
LAUNCHER = """
def ends(number, frame):
    say("launch.py was told")
    for rank in ranks: rank.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, ends); signal.signal(signal.SIGINT, ends)
ranks = []
{waits}
ranks += [subprocess.Popen(words) for words in {ranks!r}]
while None in (codes := [rank.poll() for rank in ranks]):
    if any(codes): sleep(0.3)
    sleep(0.02)
sys.exit(next((code & 255 for code in codes if code), 0))
"""
WATCHES = "from phased_cpt.launchers.parents import die_with_the_parent; "


class Called:
    """A shim, and what it stands over."""

    def __init__(self, job: Jobs) -> None:
        self.job, self.here = job, job.here
        job.logs.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(
        self, *ranks: str, shell: str = "dash", module: str = "phased_cpt", waits: str = ""
    ) -> subprocess.Popen[bytes]:
        words = [self.job.words(f"{rank}.pid", does) for rank, does in enumerate(ranks)]
        launch = self.job.words("launch.pid", LAUNCHER.format(ranks=words, waits=waits), "deepspeed.launcher.launch")
        runner = self.job.words("runner.pid", RUNNER.format(launcher=launch))[2]
        # Not behind a #!: there the path of Python may not have a blank in it.
        (self.here / "real").mkdir(exist_ok=True)
        (self.here / "real/deepspeed").write_text(runner)
        self._program("deepspeed", f"#!/bin/sh\nexec '{sys.executable}' '{self.here}/real/deepspeed' \"$@\"\n")
        self._program("python", f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
        environment = {"PATH": f"{SHIM.parent}:{self.here}/bin:/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
        called = [shutil.which(shell) or shell, str(SHIM), "--num_gpus=2", "-m", module, "-c", "run.yaml"]
        self.process = subprocess.Popen(called, env=environment, cwd=self.here, start_new_session=True)
        return self.process

    def _program(self, name: str, text: str) -> None:
        (self.here / "bin").mkdir(exist_ok=True)
        (self.here / "bin" / name).write_text(text)
        (self.here / "bin" / name).chmod(0o755)

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.here.glob("*.pid")]

    def train(self, ranks: int = 2) -> None:
        for rank in range(ranks):
            pid_of(self.here / f"trains-{rank}")
        assert all(map(is_alive, self.pids()))
        assert len(self.pids()) == ranks + 2

    def nobody_is_left(self) -> bool:
        return all(map(is_gone_soon, self.pids()))

    def heard(self, rank: int) -> str:
        path = self.here / f"heard-{rank}"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def called(job: Jobs) -> Iterator[Called]:
    call = Called(job)
    yield call
    for pid in [*call.pids(), *([call.process.pid] if call.process and call.process.poll() is None else [])]:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda how: how.name)
def test_a_signal_to_the_shim_is_a_stop_of_the_ranks(how: signal.Signals, shell: str, called: Called) -> None:
    shim = called("train(0)", "train(1)", shell=shell)
    called.train()
    assert called.heard(0) == called.heard(1) == "", "the control: nobody has told them yet"
    shim.send_signal(how)
    assert shim.wait(20) == 75
    assert called.nobody_is_left()
    assert called.heard(0) == called.heard(1) == "SIGTERM "
    assert not (called.here / "launch.py was told").exists()


def test_what_is_none_of_ours_ends_as_deepspeed_does(called: Called) -> None:
    shim = called("train(0)", module="train")
    called.train(1)
    shim.terminate()
    assert shim.wait(20) == -15
    assert is_alive(pid_of(called.here / "0.pid")), "which is why there is a guard"
    assert called.heard(0) == ""


def test_a_phase_goes_on_after_a_checkpoint_that_was_asked_for(called: Called) -> None:
    shim = called("train(0)", "wait('trains-0'); say('trains-1'); sleep(0.5); train(1)")  # one has no handler yet
    called.train()
    shim.send_signal(signal.SIGUSR1)
    while called.heard(0) != "SIGUSR1 ":
        time.sleep(0.02)
    time.sleep(0.8)
    assert is_alive(pid_of(called.here / "1.pid"))
    shim.terminate()
    assert shim.wait(20) == 75
    assert called.heard(0) == "SIGUSR1 SIGTERM "
    assert called.nobody_is_left()


@pytest.mark.parametrize("code", [0, 4])
def test_the_exit_code_of_the_ranks_is_passed_on(code: int, called: Called) -> None:
    shim = called(f"sleep(0.2); sys.exit({code})")
    assert shim.wait(20) == code
    assert called.nobody_is_left()


def test_a_failure_during_a_stop_is_no_stop(called: Called) -> None:
    shim = called("train(0, code=5)")
    called.train(1)
    shim.terminate()
    assert shim.wait(20) == 5


@pytest.mark.parametrize("when", ["before there are ranks", "at their imports"])
def test_a_stop_before_anything_is_trained(when: str, called: Called) -> None:
    shim = called("sleep(60)", waits="sleep(60)" if when == "before there are ranks" else "")
    pid_of(called.here / ("launch.pid" if when == "before there are ranks" else "0.pid"))
    shim.terminate()
    assert shim.wait(20) == 75
    assert called.nobody_is_left()


def test_the_second_signal_ends_them_all(called: Called) -> None:
    shim = called(DEAF.format(0), DEAF.format(1))
    called.train()
    shim.terminate()
    time.sleep(1.2)
    assert shim.poll() is None
    assert all(map(is_alive, called.pids())), "the control: once is not twice"
    shim.send_signal(signal.SIGINT)
    assert shim.wait(20) == 75
    assert called.nobody_is_left()


DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('trains-{0}'); sleep(60)"


def test_what_comes_together_is_one_signal(called: Called) -> None:
    """A terminal that is closed: SIGHUP from it, SIGTERM from the session."""
    shim = called("train(0)", "train(1)")
    called.train()
    for how in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        shim.send_signal(how)
        time.sleep(0.02)
    assert shim.wait(20) == 75
    assert called.heard(0) == "SIGTERM "


@pytest.mark.parametrize("who, code", [("the guard", -9), ("launch", 75), ("runner", 75)])
def test_when_one_of_them_is_killed_the_ranks_stop(who: str, code: int, called: Called) -> None:
    shim = called(WATCHES + "die_with_the_parent(); train(0)", WATCHES + "die_with_the_parent(); train(1)")
    called.train()
    if who == "launch":
        time.sleep(1.2)  # until the guard has looked
    os.kill(shim.pid if who == "the guard" else pid_of(called.here / f"{who}.pid"), signal.SIGKILL)
    assert shim.wait(20) == code
    assert called.nobody_is_left()
    assert called.heard(0) == called.heard(1) == "SIGTERM "


def test_nohup_is_kept(called: Called) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        shim = called("train(0)")
    finally:
        signal.signal(signal.SIGHUP, before)
    called.train(1)
    shim.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert shim.poll() is None
    shim.terminate()
    assert shim.wait(20) == 75
    assert called.heard(0) == "SIGTERM "


def test_without_a_python_that_knows_us_deepspeed_is_called_as_ever(called: Called) -> None:
    shim = called("train(0)")
    called.train(1)
    shim.terminate()
    assert shim.wait(20) == 75
    for path in called.here.glob("*.pid"):
        path.unlink()
    called._program("python", "#!/bin/sh\nexit 1\n")
    bare = subprocess.Popen(
        [str(SHIM), "-m", "phased_cpt"], env={"PATH": f"{SHIM.parent}:{called.here}/bin:/usr/bin:/bin"}
    )
    assert pid_of(called.here / "runner.pid") == bare.pid, "nothing stands in between"
    pid_of(called.here / "0.pid")
    bare.terminate()
    assert bare.wait(20) == -15
