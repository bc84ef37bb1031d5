"""Bytes of held-out sets, for bits per byte."""

import json
from pathlib import Path

import pytest

from phased_cpt.data.prepared import PreparedRun
from phased_cpt.data.text_bytes import text_bytes
from tests.conftest import Write
from tests.data.conftest import Prepare, lines

TEXTS = ["plain", "naïve 日本 👩‍👩‍👧", "tabs\tand\r\nlines\n", "a <|endoftext|> that somebody wrote", "long " * 100]
CACHE = Path("outputs/cache")


def counted(run: PreparedRun, side: str = "train") -> int:
    return text_bytes(run.phases[0].splits[side], run.tokenizer, CACHE)


def test_bytes_are_those_of_the_texts_that_were_read(prepared: Prepare, write: Write) -> None:
    """No EOS, no window twice, no character for a byte."""
    write(lines(*({"text": text} for text in TEXTS)), "a.jsonl")
    run = prepared("a.jsonl", eval_share=0, overlap_tokens=20)
    expected = sum(len(text.encode()) for text in TEXTS)
    assert counted(run) == expected
    assert sum(map(len, TEXTS)) != expected, "the control: characters are no bytes"
    assert run.phases[0].train.index.account.tokens_context > 0, "the control: there are windows that overlap"


def test_each_side_has_its_own_and_together_they_are_the_source(prepared: Prepare, write: Write) -> None:
    write(lines(*({"text": f"{text} {at}"} for at in range(20) for text in TEXTS)), "a.jsonl")
    run = prepared("a.jsonl", eval_share=0.3)
    sides = [counted(run, side) for side in ("train", "eval")]
    assert sum(sides) == sum(len(f"{text} {at}".encode()) for at in range(20) for text in TEXTS)
    assert min(sides) > 0


def test_what_is_cut_off_is_not_counted(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "word " * 100}), "a.jsonl")
    run = prepared("a.jsonl", eval_share=0, chunk_long_samples=False)
    (row,) = run.phases[0].train.index.blocks
    measured = run.tokenizer.reference.decode(row["input_ids"].tolist(), skip_special_tokens=True)
    assert counted(run) == len(measured) < 500


@pytest.mark.requirement("T-12")
def test_of_a_chat_only_the_assistant_s_words_are_counted(prepared: Prepare, write: Write) -> None:
    turns = [("user", "Wo?"), ("assistant", "In Köln."), ("user", "Und dann?"), ("assistant", "日本")]
    write(lines({"messages": [{"role": role, "content": words} for role, words in turns]}), "a.jsonl")
    only, whole = (prepared("a.jsonl", eval_share=0, assistant_only_loss=on) for on in (True, False))
    assert counted(only) == len("In Köln.".encode()) + len("日本".encode())
    assert counted(whole) == sum(len(f"{role}\n{words}\n".encode()) for role, words in turns), "the control"


def test_the_second_time_it_is_remembered(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "one"}), "a.jsonl")
    run = prepared("a.jsonl", eval_share=0)
    assert counted(run) == 3
    (memory,) = (CACHE / "bytes").iterdir()
    memory.write_text(json.dumps({"bytes": 4}))
    assert counted(run) == 4, "nothing is read for it"
    for damage in ("", "[]", '{"bytes": "4"}', '{"bytes": true}'):
        memory.write_text(damage)
        assert counted(run) == 3
