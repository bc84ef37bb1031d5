"""Ranks for the tests that need an engine: programs of `programs.py`, several specs in one fork."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.journeys.conftest import zygote  # noqa: F401 - a fixture
from tests.zygote import Zygote


@dataclass
class Trained:
    """One phase, as its ranks have told it."""

    lines: list[dict[str, Any]]
    measured: list[dict[str, Any]]
    told: list[str]
    order: list[int]
    of_ranks: list[dict[str, Any]]
    weights: dict[str, Tensor]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines]

    @property
    def failed(self) -> list[tuple[int, str] | None]:
        """The exit code and the words of each rank."""
        return [rank["failed"] and tuple(rank["failed"]) for rank in self.of_ranks]

    def seen(self) -> list[tuple[int, list[int], list[int]]]:
        """Every forward of the training, of all ranks: step, places, labels of each row."""
        return sorted((step, places, labels) for rank in self.of_ranks for step, places, labels in rank["seen"])


Phases = Callable[..., list[Trained]]
Plain = Callable[..., list[tuple[list[float], dict[str, Tensor]]]]


@pytest.fixture
def phases(zygote: Zygote, tmp_path: Path) -> Phases:  # noqa: F811
    """Specs, trained in so many ranks."""

    def run(*specs: dict[str, Any], ranks: int = 1) -> list[Trained]:
        found = zygote.call("tests.train.programs:phases", specs, str(tmp_path), ranks=ranks, folder=tmp_path)
        files = [load_file(tmp_path / f"{at}.safetensors") for at in range(len(specs))]
        return [Trained(**each, weights=weights) for each, weights in zip(found, files, strict=True)]

    return run


@pytest.fixture
def plain(zygote: Zygote, tmp_path: Path) -> Plain:  # noqa: F811
    """Specs, trained by a loop of plain torch: losses and weights."""

    def run(*specs: dict[str, Any]) -> list[tuple[list[float], dict[str, Tensor]]]:
        found = zygote.call("tests.train.programs:plain", specs, str(tmp_path), folder=tmp_path)
        return [(each["losses"], load_file(tmp_path / f"{at}.safetensors")) for at, each in enumerate(found)]

    return run


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
