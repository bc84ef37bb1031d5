"""Bases and adapters, made once; and merges in this process, which has torch already."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.merge.kinds import Made, make


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model is not faster with more; and what is forked has none of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written stays in the page cache; and threads of a tokenizer would be missed in what is forked."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A base and an adapter of a kind. Whoever changes them copies them first."""
    there: dict[str, Made] = {}

    def once(kind: str) -> Made:
        if kind not in there:
            there[kind] = make(kind, tmp_path_factory.mktemp("kind"))
        return there[kind]

    return once


Making = Callable[[str], Made]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "merged_model"
