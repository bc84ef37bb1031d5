"""One tiny run for all of them, and the verb called as the shell would."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phased_cpt.__main__ import Rooms
from phased_cpt.cli import main
from phased_cpt.conductor import conduct
from phased_cpt.config import from_record
from phased_cpt.data.watch import Unwatched
from phased_cpt.plan import Wanted, make_plan
from phased_cpt.run_dir import RunDir
from tests.conftest import SAMPLE, TOKENIZER, Answer
from tests.journeys.conftest import SHAPE, zygote  # noqa: F401 - a fixture
from tests.zygote import ForkedJobs, Zygote

Evaluate = Callable[..., Answer]
SOURCES = {"foundation": "phase1_foundation.jsonl", "evolution": "phase2_evolution.jsonl"}


def curriculum(folder: Path, **data: Any) -> dict[str, Any]:
    """Two phases that learn much in little, so that no two models are alike."""
    return {
        "run": {"name": "tiny", "dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        "model": {"from_config": SHAPE, "tokenizer": str(TOKENIZER), "precision": "fp32"},
        "lora": {"r": 4, "alpha": 8, "target_modules": "auto"},
        "data": {"max_tokens": 128, "overlap_tokens": 16, "eval_share": 0.1, "eval_max_tokens": 1500, **data},
        "training": {
            "micro_batch_size": 4, "global_batch_size": 8, "learning_rate": 0.02, "warmup_steps": 1, "deepspeed": "zero2",
        },
        "evaluation": {"every_steps": 2, "micro_batch_size": 3},
        "phases": [
            {"name": name, "sources": str(folder / file), "max_steps": 4} for name, file in SOURCES.items()
        ],
    }  # fmt: skip


def trained(zygote: Zygote, folder: Path, ranks: int = 2, **data: Any) -> Path:  # noqa: F811
    for file in SOURCES.values():
        shutil.copy(SAMPLE / file, folder)
    plan, run = make_plan(from_record(curriculum(folder, **data), "test")), RunDir(folder / "run")
    conduct(plan, run, ForkedJobs(zygote, ranks), Wanted(), Unwatched(), lambda *seen: None)
    return run.root


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """So small a model only waits for a second one, where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return trained(zygote, tmp_path_factory.mktemp("evaluated"))


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """`phased-cpt evaluate …`, in this process and on the CPU."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *map(str, arguments), "--device", "cpu"], rooms=Rooms())
        return Answer(int(stop.value.code or 0), *capsys.readouterr())

    return called


def models(answer: Answer) -> dict[str, Any]:
    """The facts of every model; what is not JSON fails here, and so does a word too many."""
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found["models"]
