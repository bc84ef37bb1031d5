"""The DataLoader of a phase, in one call."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phased_cpt.config import Data, Model, Phase, RunConfig, Source, load
from phased_cpt.data.prepare import prepare
from phased_cpt.errors import InputError
from phased_cpt.plan import make_plan
from phased_cpt.train import data_loader
from tests.conftest import TOKENIZER, Write
from tests.data.conftest import lines

TEXTS = lines(*({"text": f"This is document number {number}. " * 3} for number in range(100)))


@pytest.fixture
def run(write: Write) -> RunConfig:
    write(TEXTS, "a.jsonl")
    return RunConfig(
        model=Model(from_config={"model_type": "llama", "vocab_size": 4096}, tokenizer=str(TOKENIZER)),
        data=Data(max_tokens=64, overlap_tokens=8),
        phases=(Phase(name="one", sources=(Source(path="a.jsonl"),)),),
    )


@pytest.mark.requirement("D-11")
def test_one_call_gives_batches_of_a_phase(run: RunConfig) -> None:
    batches = list(data_loader(run, "one", batch_size=4))
    assert next(iter(data_loader(run, "one")))["labels"].shape[0] == run.training.micro_batch_size == 1
    assert list(batches[0]) == ["input_ids", "position_ids", "labels"]
    assert all(values.shape == (4, 64) and values.dtype == torch.int64 for values in batches[0].values())
    held_out = torch.cat([batch["input_ids"] for batch in data_loader(run, "one", split="eval")])
    assert len(held_out) >= 1
    with pytest.raises(InputError, match="one has no split 'test'; there are train, eval"):
        data_loader(run, "one", split="test")
    with pytest.raises(InputError, match=r"no phase is called 'two' .phases: one."):
        data_loader(run, "two")


def test_a_file_is_the_same_as_its_objects(run: RunConfig, config: Callable[..., Path]) -> None:
    path = config("a.jsonl")
    one = torch.cat([batch["labels"] for batch in data_loader(run, "one")])
    other = torch.cat([batch["labels"] for batch in data_loader(path, "phase_0")])
    assert sorted(one.tolist()) == sorted(other.tolist())
    assert one.tolist() != other.tolist(), "a phase of another name has an order of its own"


def test_rows_come_in_the_order_of_the_run_and_every_row_once_an_epoch(
    run: RunConfig, config: Callable[..., Path]
) -> None:
    prepared = prepare(make_plan(load(config("a.jsonl")))).phases[0]
    blocks = prepared.train.index.blocks
    loader = data_loader(Path("run.json"), "phase_0", batch_size=1, epochs=2)
    rows = [batch["input_ids"][0].tolist() for batch in loader]
    assert rows == [blocks[at]["input_ids"].tolist() for at in prepared.order(2).tolist()]
    assert sorted(rows[: len(blocks)]) == sorted(rows[len(blocks) :])
    assert rows[: len(blocks)] != rows[len(blocks) :]


def test_workers_of_the_loader_read_the_same_rows(run: RunConfig) -> None:
    loader = data_loader(run, "one", batch_size=4)
    several = torch.utils.data.DataLoader(loader.dataset, batch_size=4, num_workers=2)
    assert all(torch.equal(one["labels"], other["labels"]) for one, other in zip(loader, several, strict=True))
