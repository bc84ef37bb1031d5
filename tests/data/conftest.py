"""Runs on a page: a small tokenizer, a source, and the data that `prepare` makes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phased_cpt.config import load
from phased_cpt.data.prepare import prepare
from phased_cpt.data.prepared import PreparedPhase, PreparedRun
from phased_cpt.data.tokenizer import Tokenizer, load_tokenizer
from phased_cpt.plan import make_plan
from tests.conftest import TOKENIZER

Prepare = Callable[..., PreparedRun]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(str(TOKENIZER), None, None, tmp_path)


@pytest.fixture
def prepared(config: Callable[..., Path]) -> Prepare:
    """The data of a run with one phase for each source."""

    def make(*sources: str, set_: tuple[str, ...] = (), workers: int = 1, **data: Any) -> PreparedRun:
        return prepare(make_plan(load(config(*sources, **data), list(set_))), workers=workers)

    return make


def texts(phase: PreparedPhase, tokenizer: Tokenizer) -> list[str]:
    """The documents of every source of a phase, as they come back out of its tokens, each without its EOS."""
    found = []
    for store in {split.stores[0].folder: split.stores[0] for split in phase.splits.values()}.values():
        for ids in np.split(store.ids, store.offsets[1:-1]):
            assert ids[-1] == tokenizer.eos_id
            found.append(tokenizer.reference.decode(ids[:-1].tolist(), skip_special_tokens=False))
    return found


def lines(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
