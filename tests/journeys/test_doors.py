"""The ways in, as they are typed: one curriculum through all of them in turn, and the weights are those of one way."""

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.journeys.conftest import Ran, Tiny
from tests.zygote import Zygote, shell

HERE = "tests.journeys.test_doors"
BIN = Path(sys.executable).parent
ZERO2, ZERO3 = {}, {"training": {"deepspeed": "zero3.json"}}


def curriculum(tiny: Tiny, *phases: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Phases of two steps, nothing evaluated."""
    config = tiny(data={"eval_share": 0.0}, launch={"num_gpus": 2}, **sections)
    source = config["phases"][0]["sources"]
    named = [{"name": f"p{at}", "sources": source, "max_steps": 2} | phase for at, phase in enumerate(phases, 1)]
    return config | {"phases": named}


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    """In a shell whose PATH has the shim before the environment, and from a folder of one's own."""
    path = f"{REPOSITORY}/launch/bin:{BIN}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)


def weights(run: str, phase: int) -> str:
    path = Path(run) / f"phase{phase}_p{phase}/best_adapter/adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def require(answer: subprocess.CompletedProcess[str], *trained: int) -> None:
    """It went well, told each phase once, and said nothing of the others."""
    said = answer.stdout + answer.stderr
    assert answer.returncode == 0, said[-5000:]
    for phase in range(1, 5):
        assert said.count(f"published phase{phase}_p{phase}/best_adapter") == (phase in trained), said[-5000:]
    assert "Traceback" not in said


@pytest.mark.requirement("P-01", "P-05", "S-04", "T-07")
def test_one_run_through_four_doors_has_the_weights_of_one_through_one(tiny: Tiny, ran: Ran) -> None:
    config = curriculum(tiny, ZERO2, ZERO3, ZERO2, ZERO3)
    Path("run.json").write_text(json.dumps(config))
    go_on = ("-c", "run.json")

    require(typed("phased-cpt", "run", *go_on, "--launcher", "deepspeed", "--until", "p1"), 1)
    require(typed("torchrun", "--standalone", "--nproc_per_node=2", "-m", "phased_cpt", *go_on, "--until", "p2"), 2)
    require(typed("deepspeed", "--num_gpus=2", "--master_port=29517", "-m", "phased_cpt", *go_on), 3, 4)
    assert sorted(path.name for path in Path().glob("run*") if path.is_dir()) == ["run"], "one folder for all of it"

    ran(config | {"run": {**config["run"], "dir": "at_once"}})
    found = [[weights(run, phase) for phase in (1, 2, 3, 4)] for run in ("run", "at_once")]
    assert found[0] == found[1]
    assert len(set(found[0])) == 4, "the control: every phase has moved them"


def test_local_ranks_and_one_rank_inline(tiny: Tiny) -> None:
    Path("run.json").write_text(json.dumps(curriculum(tiny, ZERO2)))
    require(typed("phased-cpt", "run", "-c", "run.json", "--run-dir", "local"), 1)
    inline = typed(
        sys.executable, "-m", "phased_cpt", "run", "--launcher", "inline", "-c", "run.json", "--run-dir", "inline"
    )
    require(inline, 1)
    ranks = [json.loads(Path(run, "run.json").read_text())["attempts"][-1] for run in ("local", "inline")]
    assert ranks[0] != ranks[1]


# Killed in the middle ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("S-03")
def test_whoever_is_killed_nobody_is_left_and_the_same_command_goes_on(tiny: Tiny) -> None:
    """First a rank, then the conductor, and then nobody."""
    config = curriculum(tiny, ZERO2) | {"phases": []}
    config["phases"] = [curriculum(tiny, ZERO2)["phases"][0] | {"max_steps": 2000}]
    Path("run.json").write_text(json.dumps(config))

    conductor, ranks = conducted()
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    out, _ = conductor.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert conductor.returncode == 1
    log = Path("run/phase1_p1/logs/rank1.log").resolve()
    assert f"rank 1 was ended by SIGKILL, as the system does when memory runs out; its output is in {log}" in out
    assert not any(map(is_alive, ranks))
    assert not Path("run/phase1_p1/best_adapter").exists()

    conductor, ranks = conducted()
    conductor.kill()
    conductor.wait()
    deadline = time.monotonic() + 10
    while any(map(is_alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, ranks))
    assert not Path("run/phase1_p1/best_adapter").exists()

    require(typed("phased-cpt", "run", "-c", "run.json", "--set", "phases.p1.max_steps=2", "--redo-from", "p1"), 1)


def conducted() -> tuple[subprocess.Popen[str], list[int]]:
    """A run whose ranks have trained a step."""
    steps = Path("run/phase1_p1/logs/train.jsonl")
    before = steps.read_text().count("\n") if steps.exists() else 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    conductor = subprocess.Popen(
        [BIN / "phased-cpt", "run", "-c", "run.json"], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (steps.exists() and steps.read_text().count("\n") > before) and conductor.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert conductor.poll() is None, conductor.communicate()[0]
    children = Path(f"/proc/{conductor.pid}/task/{conductor.pid}/children").read_text().split()
    ranks = {environ(int(child)).get("RANK"): int(child) for child in children}
    return conductor, [ranks["0"], ranks["1"]]


def environ(process: int) -> dict[str, str]:
    words = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Memory -----------------------------------------------------------------------------------------------------------------


def counted(arguments: list[str], result: str) -> None:
    """What is left in a rank after each phase; the last one's engine is kept."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch import Tensor
    from transformers import Trainer

    import phased_cpt.ranks as ranks
    import phased_cpt.train.phase_run as phase_run

    found, kept = [], []
    train_phase, tear_down = ranks.train_phase, phase_run.tear_down

    def phase(job: Any, rank: Any) -> None:
        train_phase(job, rank)
        gc.collect()
        alive = [each for each in gc.get_objects() if isinstance(each, (Tensor, DeepSpeedEngine, Trainer))]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        kinds = {
            kind.__name__: sum(isinstance(each, kind) for each in alive) for kind in (Tensor, DeepSpeedEngine, Trainer)
        }
        found.append(kinds | {"rss": pages * os.sysconf("SC_PAGE_SIZE")})
        del alive
        if os.environ["RANK"] == "0":
            Path(result).write_text(json.dumps(found))  # a rank leaves without coming back here

    def keeping(trainer: Any) -> None:
        if len(found) == 6:
            kept.append(trainer.model_wrapped)
        tear_down(trainer)

    ranks.train_phase, phase_run.tear_down = phase, keeping
    shell(arguments)


@pytest.mark.requirement("S-06")
def test_between_phases_of_one_process_memory_is_as_it_was(tiny: Tiny, zygote: Zygote) -> None:
    config = curriculum(tiny, *[ZERO2, ZERO3] * 3, ZERO2)
    Path("run.json").write_text(json.dumps(config))
    codes = zygote.ranks(f"{HERE}:counted", [["-c", "run.json"], "found.json"], 2, Path("told"))
    assert codes == [0, 0], Path("told/rank0.log").read_text()[-3000:]
    *phases, held = json.loads(Path("found.json").read_text())
    assert len(phases) == 6
    assert [(phase["DeepSpeedEngine"], phase["Trainer"]) for phase in phases] == [(0, 0)] * 6
    assert max(phase["Tensor"] for phase in phases) <= phases[1]["Tensor"] + 2, phases
    # The first two load what each kind of engine needs; from there on it is flat within what an allocator keeps.
    assert max(phase["rss"] for phase in phases) - phases[1]["rss"] < 20 * 2**20, phases
    assert held["DeepSpeedEngine"] == 1, "the control: an engine that is kept is seen"
    assert held["Tensor"] > phases[-1]["Tensor"] + 20
