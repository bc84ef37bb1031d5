"""launch/slurm.sbatch, as Slurm calls it: a copy in another folder, with srun, scancel and scontrol of one machine."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.launch.conftest import Small
from tests.launch.programs import HEARS, Stage, ended, kill_all_marked, script, started, steps_of, wait_until

BATCH = REPOSITORY / "launch/slurm.sbatch"
FAKES = Path(__file__).with_name("slurm_programs.py")
SRUN = "srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=0"
JOB = "4711"


class Cluster:
    """A job of a queue that puts no job back by itself: the test does."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage, self.calls_file = stage, folder / "slurm calls"
        for name in ("srun", "scancel", "scontrol"):
            script(folder / "slurm" / name, f"exec '{sys.executable}' -I '{FAKES}' {name} \"$@\"\n")
        self.copy = folder / "spool/slurm_script"
        self.copy.parent.mkdir()
        shutil.copy(BATCH, self.copy)
        self.environment = {
            "PATH": f"{folder / 'slurm'}:/usr/bin:/bin", "SLURM_JOB_ID": JOB, "SLURM_CALLS": str(self.calls_file),
            "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(stage.here),
        }  # fmt: skip

    def called(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.stage.call(self.copy, *words, **self.environment, **environment)

    def started(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        return self.stage.start(self.copy, *words, **self.environment, **environment)

    def calls(self, program: str) -> list[str]:
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        words = [json.loads(line) for line in text.splitlines()]
        return [" ".join(each) for each in words if each[0] == program]


@pytest.fixture
def cluster(stage: Stage, tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(stage, tmp_path)
    kill_all_marked(f"SLURM_CALLS={tmp_path / 'slurm calls'}")


def test_each_of_its_lines_for_sbatch_is_explained() -> None:
    options = [line for line in BATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    lines = BATCH.read_text().splitlines()
    assert len(options) == 10
    assert all(lines[lines.index(line) - 1].startswith("# ") for line in options)
    first_command = next(at for at, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines.index(options[-1]) < first_command, "behind it sbatch reads no more of them"


# What is called -------------------------------------------------------------------------------------------------------


def test_on_one_node_it_is_preflight_and_one_run(cluster: Cluster) -> None:
    assert cluster.called("-c", "a b.yaml", "--until", "p2", "--set", "run.seed=$(x)").returncode == 0
    seed = ["--set", "run.seed=$(x)"]
    assert cluster.stage.calls() == [
        ["preflight", "-c", "a b.yaml", *seed],
        ["run", "-c", "a b.yaml", "--until", "p2", *seed],
    ]
    assert [call.split(" bash -c ")[0] for call in cluster.calls("srun")] == [f"{SRUN} --nodes=1 --ntasks=1"] * 2


def test_on_each_node_it_is_the_same_run_with_the_number_of_the_node(cluster: Cluster) -> None:
    cluster.environment["SLURM_NNODES"] = "2"
    assert cluster.called("-c", "a", "--set", "x=b c").returncode == 0
    meeting = ["--nnodes", "2", "--master-addr", "node1", "--master-port", "24711"]
    words = ["-c", "a", "--set", "x=b c"]
    for verb in ("preflight", "run"):
        called = sorted(cluster.stage.calls(verb))
        assert called == [[verb, *meeting, *words, "--node-rank", str(at)] for at in (0, 1)]


def test_an_array_prepares_one_phase_a_task_and_a_plain_job_all(cluster: Cluster) -> None:
    assert cluster.called("prepare", "-c", "a", SLURM_ARRAY_TASK_ID="3").returncode == 0
    assert cluster.called("prepare", "-c", "a", "--workers", "4").returncode == 0
    assert cluster.stage.calls() == [["prepare", "--phase", "3", "-c", "a"], ["prepare", "-c", "a", "--workers", "4"]]
    assert [call.split(" /")[0] for call in cluster.calls("srun")] == [f"{SRUN} --nodes=1 --ntasks=1"] * 2


@pytest.mark.parametrize("verb", ["run", "prepare"])
@pytest.mark.parametrize("code", [0, 5, 75])
def test_the_exit_status_is_that_of_the_step(verb: str, code: int, cluster: Cluster) -> None:
    assert cluster.called(verb, "-c", "a", CODE=str(code)).returncode == code
    assert cluster.calls("scontrol") == [], "also 75: --steps-today is no reason to go on at once"


def test_nothing_is_started_after_a_preflight_that_failed(cluster: Cluster) -> None:
    assert cluster.called("-c", "a", LOOKED="3").returncode == 3
    assert cluster.stage.calls("run") == []


def test_mistakes_are_told(cluster: Cluster) -> None:
    assert "it is launch/train_phased.sh" in cluster.stage.call(BATCH, "-c", "a").stderr
    assert "a number is needed" in cluster.called("-c", "a", PHASED_CPT_MOST_RESTARTS="many").stderr
    assert cluster.called("-c").returncode == 2


# Its end, and after ----------------------------------------------------------------------------------------------------


def told(cluster: Cluster, number: int, **environment: str) -> "subprocess.Popen[str]":
    """A job that has got a signal while it trains."""
    job = cluster.started("-c", "a", RUN=HEARS.format(seconds=1.2), **environment)
    assert job.stdout
    wait_until(lambda: "trains" in job.stdout.readline())  # type: ignore[union-attr]
    job.send_signal(number)
    return job


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_told_that_its_time_is_nearly_over_it_stops_and_comes_back(nodes: str, cluster: Cluster) -> None:
    cluster.environment["SLURM_NNODES"] = nodes
    said, _ = (job := told(cluster, signal.SIGUSR1)).communicate(timeout=30)
    assert said.count("heard SIGTERM and sealed") == int(nodes)
    assert cluster.calls("scancel") == [f"scancel --signal=TERM {JOB}"]
    assert cluster.calls("scontrol") == [f"scontrol requeue {JOB}"]
    assert job.returncode == 75


def test_where_scancel_fails_srun_is_asked(cluster: Cluster) -> None:
    said, _ = (job := told(cluster, signal.SIGUSR1, SCANCEL_FAILS="1")).communicate(timeout=30)
    assert said.count("heard SIGTERM and sealed") == 1
    assert (job.returncode, cluster.calls("scontrol")) == (75, [f"scontrol requeue {JOB}"])


@pytest.mark.parametrize(("preempted", "comes_back"), [("None", False), ("2026-01-02T03:04:05", True)])
def test_a_job_that_made_room_comes_back_and_one_that_was_cancelled_does_not(
    preempted: str, comes_back: bool, cluster: Cluster
) -> None:
    job = told(cluster, signal.SIGTERM, PREEMPTED=preempted)  # Slurm tells the steps, and the script as well
    environment = cluster.stage.environment | cluster.environment
    subprocess.run(["scancel", "--signal=TERM", JOB], env=environment, executable=f"{cluster.calls_file.parent}/slurm/scancel")  # fmt: skip
    said, _ = job.communicate(timeout=30)
    assert said.count("heard SIGTERM and sealed") == 1, "once"
    assert job.returncode == 75
    assert cluster.calls("scontrol") == [f"scontrol requeue {JOB}"] * comes_back


def test_it_comes_back_no_more_often_than_it_may(cluster: Cluster) -> None:
    job = told(cluster, signal.SIGUSR1, SLURM_RESTART_COUNT="3", PHASED_CPT_MOST_RESTARTS="3")
    said, _ = job.communicate(timeout=30)
    assert (job.returncode, cluster.calls("scontrol")) == (75, [])
    assert "not put into the queue again: it was 3 times" in said


def test_a_queue_that_does_not_take_it_again_is_told(cluster: Cluster) -> None:
    said, _ = (job := told(cluster, signal.SIGUSR1, REQUEUE="1")).communicate(timeout=30)
    assert job.returncode == 75
    assert "the queue does not take it again" in said


def test_a_job_that_comes_back_does_not_begin_anew(cluster: Cluster) -> None:
    words = ["-c", "a", "--new", "--resume", "none", "--resume=5", "--until", "p"]
    assert cluster.called(*words).returncode == 0
    assert cluster.called(*words, SLURM_RESTART_COUNT="1").returncode == 0
    assert cluster.stage.calls("run") == [["run", *words], ["run", "-c", "a", "--until", "p"]]


def test_the_time_of_a_preparation_is_used_to_its_end(cluster: Cluster) -> None:
    job = cluster.started("prepare", "-c", "a", RUN="print('trains', flush=True); time.sleep(1)")
    assert job.stdout
    wait_until(lambda: "trains" in job.stdout.readline())  # type: ignore[union-attr]
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    assert (job.returncode, cluster.calls("scancel")) == (0, [])


# The real one ---------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("P-08")
def test_signal_checkpoint_requeue_until_it_is_done(small: Small, cluster: Cluster) -> None:
    environment = {**small(60), **cluster.environment, "SLURM_SUBMIT_DIR": str(Path.cwd())}
    words = [str(cluster.copy), "-c", "run.json"]
    job = started(words, environment)
    wait_until(lambda: steps_of(Path("outputs")))
    job.send_signal(signal.SIGUSR1)
    stopped = ended(job)
    assert stopped.returncode == 75, stopped.stdout[-3000:]
    assert cluster.calls("scontrol") == [f"scontrol requeue {JOB}"]
    reached = steps_of(Path("outputs"))[-1]
    assert list(Path("outputs").glob("*/*/checkpoints/checkpoint-*")), "sealed"
    assert 0 < reached < 60

    again = ended(started(words, environment | {"SLURM_RESTART_COUNT": "1"}), 100)
    assert again.returncode == 0, again.stdout[-3000:]
    assert steps_of(Path("outputs")) == list(range(1, 61)), f"each step once, on from {reached}"
    assert len(list(Path("outputs").iterdir())) == 1
    assert len(cluster.calls("scontrol")) == 1
