"""A run that is short enough to be stopped at each of its file operations, and what it must end as."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.conductor import Outcome, conduct
from phased_cpt.data.watch import Unwatched
from phased_cpt.doors import Door
from phased_cpt.plan import Wanted
from phased_cpt.run_dir import RunDir
from tests.conftest import SAMPLE, TOKENIZER
from tests.faults.criterion import everything
from tests.journeys.conftest import SHAPE, data_cache, planned, zygote  # noqa: F401 - fixtures
from tests.zygote import ForkedJobs, Zygote

Config = dict[str, Any]


@dataclass
class Heard(Unwatched):
    """A watcher that keeps what it is told."""

    words: list[str] = field(default_factory=list)

    def tell(self, message: str) -> None:
        self.words.append(message)


@dataclass(frozen=True)
class Runs:
    """One configuration, and runs of it in forked ranks."""

    zygote: Zygote
    config: Config
    heard: Heard = field(default_factory=Heard)

    def door(self, program: str = "works", *first: Any, ranks: int = 2) -> ForkedJobs:
        return ForkedJobs(self.zygote, ranks, f"tests.faults.programs:{program}", first)

    def run(
        self, door: Door | None = None, folder: str = "run", config: Config | None = None, **wanted: Any
    ) -> Outcome:
        """As far as is wanted, in a folder of the working directory."""
        plan = planned(config or self.config)
        door = door or self.door()
        return conduct(plan, RunDir(Path(folder)), door, Wanted(**wanted), self.heard, lambda *seen: None)

    def with_(self, **sections: Any) -> Config:
        """The same configuration, with other values."""
        merged = {key: {**self.config.get(key, {}), **section} for key, section in sections.items() if isinstance(section, dict)}  # fmt: skip
        return self.config | sections | merged


@dataclass(frozen=True)
class Reference:
    """The run that was never disturbed, as it was on its way and at its end."""

    folder: Path  # after phase one, whole; and with checkpoints of step 1 and 2 in phase two
    whole: dict[str, Any]
    first_phase: dict[str, Any]

    def copy(self, state: str, to: str = "run") -> Path:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.folder / state, to)
        return Path(to)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of the test's own; and what is written stays in the page cache, as in the ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A few documents for each phase: an epoch is over in the second step."""
    folder = tmp_path_factory.mktemp("sources")
    documents = (SAMPLE / "phase1_foundation.jsonl").read_text().splitlines(keepends=True)
    for name, at in (("a", 6), ("b", 11)):
        (folder / f"{name}.jsonl").write_text("".join(documents[at : at + 5]))
    return folder / "a.jsonl", folder / "b.jsonl"


@pytest.fixture(scope="session")
def short(sources: tuple[Path, Path], data_cache: Path) -> Config:  # noqa: F811
    """Two phases of three steps: dropout, accumulation, evaluations, and a checkpoint after each step."""
    return {
        "run": {"name": "short", "dir": "run", "cache_dir": str(data_cache)},
        "model": {"from_config": SHAPE, "tokenizer": str(TOKENIZER), "precision": "fp32"},
        "lora": {"r": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"], "dropout": 0.1},
        "data": {"max_tokens": 128, "overlap_tokens": 16, "eval_share": 0.2, "eval_max_tokens": 600},
        "training": {
            "micro_batch_size": 2, "global_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0,
            "deepspeed": "zero2",
        },
        "evaluation": {"every_steps": 1, "micro_batch_size": 4},
        "checkpoint": {"every_steps": 1, "keep": 2},
        "merge": {"enabled": False},
        "phases": [
            {"name": name, "sources": str(path), "max_steps": 3}
            for name, path in zip(("one", "two"), sources, strict=True)
        ],
    }  # fmt: skip


@pytest.fixture
def runs(zygote: Zygote, short: Config) -> Runs:  # noqa: F811
    return Runs(zygote, json.loads(json.dumps(short)))


@pytest.fixture(scope="session")
def reference(zygote: Zygote, short: Config, tmp_path_factory: pytest.TempPathFactory) -> Reference:  # noqa: F811
    """Made once: stopped on the way only to be copied, and its end is that of one that was never stopped."""
    folder, runs = tmp_path_factory.mktemp("reference"), Runs(zygote, short)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda file: None)
        runs.run(last="one")
        first_phase = everything(Path("run"))
        shutil.copytree("run", "one is done")
        runs.run()
        whole = everything(Path("run"))
        shutil.copytree("run", "all is done")
        for steps, state in ((2, "two steps of one"), (5, "two steps of two")):
            shutil.rmtree("run")
            with pytest.raises(Exception, match="the same command goes on"):
                runs.run(steps_today=steps)
            shutil.copytree("run", state)
    return Reference(folder, whole, first_phase)


Told = Callable[..., None]
