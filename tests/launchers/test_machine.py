"""GPUs by a nvidia-smi of our own: CUDA_VISIBLE_DEVICES is read as CUDA reads it."""

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phased_cpt.conductor import LaunchedJobs
from phased_cpt.config import from_record
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.launchers import LAUNCHERS, Place, Program, gpus_here, machine, ranks_here, shared
from phased_cpt.plan import make_plan

MIB = 2**20
FOUR = "81920\n81920\n40960\n40960\n"
UUID, MIG = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-c7384736-a75d-5afc-978f-d2f1294409fd"

Machine = Callable[..., None]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine whose nvidia-smi says this."""

    def has(memory: str, exit_code: int = 0, visible: str | None = None, before: str = "") -> None:
        (tmp_path / "said").write_text(memory)
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\n{before}\ncat {tmp_path}/said\nexit {exit_code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        machine._gpus_of_the_machine.cache_clear()

    yield has
    machine._gpus_of_the_machine.cache_clear()


VISIBLE: dict[str | None, list[int]] = {
    None: [80, 80, 40, 40],
    "0,1,2,3": [80, 80, 40, 40],
    "2": [40],
    " 3 , 0 ": [40, 80],
    "": [],
    "-1": [],
    "0,-1,1": [80],
    "1,9,2": [80],  # CUDA stops at the first that is none
    "9": [],
    "NoDevFiles": [],
    "0,,1": [80],
    "0,0": [],  # one that comes twice makes CUDA see nothing
    UUID: [40],  # which one it is, is not asked: the smallest is a safe answer
    f"{UUID},GPU-b": [40, 40],
    MIG: [40],
    "MIG-GPU-b/1/0,MIG-GPU-b/2/0": [40, 40],
}


@pytest.mark.parametrize("visible", VISIBLE)
def test_the_visible_gpus(visible: str | None, gpus: Machine) -> None:
    gpus(FOUR, visible=visible)
    assert [size // (1024 * MIB) for size in gpus_here()] == VISIBLE[visible]
    assert ranks_here(None) == max(1, len(VISIBLE[visible]))
    assert ranks_here(3) == 3
    assert ("DS_ACCELERATOR" in shared(Place.alone(1))) == (VISIBLE[visible] == []), (
        "without GPUs it is the CPU that trains"
    )


def test_a_gpu_that_does_not_tell_its_memory_is_one_all_the_same(gpus: Machine) -> None:
    """Where it has none of its own: its memory is the host's."""
    gpus("[N/A]\n")
    assert gpus_here() == (0,)


@pytest.mark.parametrize("said, exit_code", [("NVIDIA-SMI has failed because it couldn't communicate", 9), ("", 0)])
def test_a_nvidia_smi_without_gpus(said: str, exit_code: int, gpus: Machine) -> None:
    gpus(said, exit_code)
    assert gpus_here() == ()


def test_a_nvidia_smi_that_does_not_answer_is_told(gpus: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PATIENCE_SECONDS", 0.2)
    gpus(FOUR, before="exec sleep 60")
    with pytest.raises(PhasedCptError, match=r"has not answered for 0 s: a GPU may be broken"):
        gpus_here()


def test_more_ranks_than_gpus_are_refused(gpus: Machine) -> None:
    model = {"from_config": {"model_type": "llama", "vocab_size": 4096}, "tokenizer": "tokenizer.json"}
    phases = [{"name": "one", "sources": "a.jsonl"}]

    def jobs(num_gpus: int | None) -> LaunchedJobs:
        launch = {"num_gpus": num_gpus}
        return LaunchedJobs.of(make_plan(from_record({"model": model, "phases": phases, "launch": launch}, "test")))

    gpus(FOUR, visible="1,2")
    assert jobs(2).ranks == jobs(None).ranks == 2
    with pytest.raises(InputError, match=r"launch.num_gpus is 3, and 2 GPUs are visible here"):
        jobs(3)
    gpus(FOUR, visible="")
    assert jobs(3).ranks == 3, "the control: a CPU has as many as are asked for"


@pytest.mark.parametrize("visible, ranks, ids", [(None, 2, ["0", "1"]), ("2,3", 2, ["2", "3"]), ("3,2,1", 2, ["3", "2"]),
                                                 (UUID, 1, [UUID]), ("", 2, ["0", "1"])])  # fmt: skip
def test_the_deepspeed_launcher_takes_the_gpus_that_are_visible(
    visible: str | None, ranks: int, ids: list[str], gpus: Machine
) -> None:
    """With --num_gpus=2 it would take the first two of the machine, which may be somebody else's."""
    gpus(FOUR, visible=visible)
    (command,) = LAUNCHERS["deepspeed"](Program("worker", Path("job.json"), Path("logs")), Place.alone(ranks))
    (world,) = [word.partition("=")[2] for word in command.words if word.startswith("--world_info=")]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": ids}


def test_ranks_on_a_cpu_share_its_cores(gpus: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    gpus("")
    cores = len(os.sched_getaffinity(0))
    assert [int(shared(Place.alone(ranks))["OMP_NUM_THREADS"]) for ranks in (1, cores, 2 * cores)] == [cores, 1, 1]
    gpus(FOUR)
    assert "OMP_NUM_THREADS" not in shared(Place.alone(2))
