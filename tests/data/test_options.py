"""Every key of `data` reaches the rows: seen through `prepare`, as a user sees it."""

from pathlib import Path

import numpy as np
import pytest

from phased_cpt.data.blocks import IGNORED
from phased_cpt.data.prepared import PreparedRun
from tests.conftest import Write
from tests.data.conftest import Prepare, lines

LONG = [{"text": f"number {at}: " + "word " * (60 + at)} for at in range(40)]
SHORT = [{"text": f"short {at}"} for at in range(40)]


def account(run: PreparedRun, side: str = "train"):  # type: ignore[no-untyped-def]
    return run.phases[0].splits[side].index.account


def rows_as_text(run: PreparedRun) -> list[str]:
    blocks = run.phases[0].train.index.blocks
    decode = run.tokenizer.reference.decode
    return [decode(blocks[at]["input_ids"].tolist(), skip_special_tokens=False) for at in range(len(blocks))]


def test_documents_of_several_sources_come_each_from_their_own(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "from a"}, {"text": "also from a"}), "a.jsonl")
    write(lines({"text": "from b"}), "b.jsonl")
    run = prepared("a.jsonl", set_=("phases.0.sources=[a.jsonl, b.jsonl]",), eval_share=0, packing="pad")
    (row,) = rows_as_text(run)
    assert row.startswith("from a<|endoftext|>also from a<|endoftext|>from b<|endoftext|>")


@pytest.mark.requirement("D-07")
def test_shuffle_false_keeps_the_order_of_rows_and_of_what_is_in_them(prepared: Prepare, write: Write) -> None:
    write(lines(*LONG), "a.jsonl")
    kept, mixed = (prepared("a.jsonl", shuffle=shuffle).phases[0] for shuffle in (False, True))
    assert kept.order(2).tolist() == [*range(len(kept.train.index.blocks))] * 2
    assert mixed.order(1).tolist() != kept.order(1).tolist()
    assert kept.train.index.folder != mixed.train.index.folder, "packed in groups"


@pytest.mark.requirement("K-03")
def test_long_documents_are_windows_or_shortened(prepared: Prepare, write: Write) -> None:
    write(lines(*LONG), "a.jsonl")
    windows, cut = (account(prepared("a.jsonl", chunk_long_samples=chunk)) for chunk in (True, False))
    assert (windows.tokens_dropped, windows.documents_shortened) == (0, 0)
    assert cut.documents_shortened == cut.documents == cut.blocks
    assert cut.tokens_dropped == cut.tokens_source - 64 * cut.documents


@pytest.mark.requirement("K-04")
def test_repeated_tokens_are_trained_if_asked_for_and_never_measured_twice(prepared: Prepare, write: Write) -> None:
    write(lines(*LONG), "a.jsonl")
    masked, counted = (prepared("a.jsonl", overlap_loss=how) for how in ("mask", "count"))
    assert account(masked).tokens_repeated == 0 < account(counted).tokens_repeated
    assert account(counted).tokens_trained > account(masked).tokens_trained
    assert account(counted, "eval") == account(masked, "eval")
    blocks = counted.phases[0].train.index.blocks
    labels = sum(int((blocks[at]["labels"] != IGNORED).sum()) for at in range(len(blocks)))
    assert labels == account(counted).tokens_trained


def test_what_is_held_out_is_measured_whole_whatever_is_dropped_in_training(prepared: Prepare, write: Write) -> None:
    write(lines(*LONG), "a.jsonl")
    run = prepared("a.jsonl", packing="concat", eval_share=0.3)
    assert account(run).tokens_dropped > 0 == account(run, "eval").tokens_dropped
    assert account(run).tokens_padded == 0 < account(run, "eval").tokens_padded


@pytest.mark.requirement("D-04")
def test_the_cap_and_the_seed_of_the_split(prepared: Prepare, write: Write) -> None:
    write(lines(*SHORT * 20, *({"text": f"more {at}"} for at in range(400))), "a.jsonl")
    free = account(prepared("a.jsonl", eval_share=0.5), "eval").tokens_source
    assert account(prepared("a.jsonl", eval_share=0.5, eval_max_tokens=200), "eval").tokens_source <= 200 < free
    held = [set(prepared("a.jsonl", split_seed=seed).phases[0].splits["eval"].digests.tolist()) for seed in (0, 1)]
    assert held[0] != held[1]


def test_a_document_that_was_held_out_to_have_any_is_remembered(prepared: Prepare, write: Write) -> None:
    def held() -> set[int]:
        return set(prepared("a.jsonl").phases[0].splits["eval"].digests.tolist())

    write(lines(*SHORT[:3]), "a.jsonl")
    (first,) = held()
    write(lines(*SHORT, *LONG), "a.jsonl")
    assert first in held()
    for file in Path("outputs/cache/splits").iterdir():
        file.unlink()
    assert first not in held(), "the control: it is not one that would be held out anyway"
    for damage in ("5", "null", "[1]", '{"0": 5}', '{"0": ["x"]}', '{"0": [-1]}', '{"0": [99999999999999999999]}', "{"):
        next(Path("outputs/cache/splits").iterdir(), Path("outputs/cache/splits/x.json")).write_text(damage)
        assert held()


def test_which_half_of_a_source_is_drawn_depends_on_the_seed_of_the_run(prepared: Prepare, write: Write) -> None:
    write(lines(*SHORT), "a.jsonl")
    half = "phases.0.sources={path: a.jsonl, weight: 0.5}"
    one, again, other = (
        sorted(rows_as_text(prepared("a.jsonl", set_=(half, f"run.seed={seed}"), eval_share=0))) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_a_phase_knows_what_its_fingerprint_needs(prepared: Prepare, write: Write) -> None:
    write(lines(*SHORT), "a.jsonl")
    write(lines(*LONG), "b.jsonl")
    own = "phases.0.eval_sources=b.jsonl"
    plain, with_own = (prepared("a.jsonl", set_=how).phases[0].source_digests for how in ((), (own,)))
    assert list(plain) == ["sources.0"]
    assert list(with_own) == ["sources.0", "eval_sources.0"]
    other_split = prepared("a.jsonl", eval_share=0.4).phases[0].source_digests
    assert plain != other_split, "what is held out is part of it"
    Path("a.jsonl").rename("c.jsonl")
    assert prepared("c.jsonl").phases[0].source_digests == plain, "and its name is not"
    write(lines(*SHORT, {"text": "more"}), "c.jsonl")
    assert prepared("c.jsonl").phases[0].source_digests != plain


def test_a_phase_may_have_a_length_of_its_own(prepared: Prepare, write: Write) -> None:
    write(lines(*LONG), "a.jsonl")
    run = prepared("a.jsonl", "a.jsonl", set_=("phases.1.data.max_tokens=32",))
    assert [len(phase.train.index.blocks[0]["labels"]) for phase in run.phases] == [64, 32]
    assert [phase.train.stores[0].cached for phase in run.phases] == [False, True], "from the same tokens"
    assert np.array_equal(run.phases[0].train.stores[0].ids, run.phases[1].train.stores[0].ids)
