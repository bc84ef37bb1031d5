"""`dataset combine`: whole records of several sources by weight, in one file."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import SAMPLE, Call, Write
from tests.data.conftest import lines

A = [{"text": f"a{at}", "kept": {"as": ["it", "is"]}} for at in range(8)]
B = [{"text": f"b{at}"} for at in range(8)]


def texts(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


@pytest.mark.requirement("D-05")
def test_sources_are_mixed_by_weight_and_records_stay_as_they_are(call: Call, write: Write) -> None:
    write(lines(*A), "a.jsonl")
    write(b'{"text":  "b0"}\r\n\n{"text": "b1",  "odd": 1e2}\n{"text":"b2"}\n{"text":"b3"}', "b.jsonl")
    answer = call("dataset", "combine", "mix.jsonl", "a.jsonl:2.5", "b.jsonl:0.5", "--json")
    facts = json.loads(answer.out)
    assert (facts["records"], facts["bytes"]) == (22, Path("mix.jsonl").stat().st_size)
    assert [(each["records_there"], each["records"], each["passes"]) for each in facts["sources"]] == [
        (8, 20, 2.5), (4, 2, 0.5),
    ]  # fmt: skip
    assert sum(each["share"] for each in facts["sources"]) == pytest.approx(1)
    found = Counter(texts("mix.jsonl"))
    assert Counter(found[f"a{at}"] for at in range(8)) == {2: 4, 3: 4}
    assert Counter(found[f"b{at}"] for at in range(4)) == {0: 2, 1: 2}
    written = [line for line in Path("mix.jsonl").read_bytes().splitlines() if b'"b' in line]
    assert set(written) <= {b'{"text":  "b0"}', b'{"text": "b1",  "odd": 1e2}', b'{"text":"b2"}', b'{"text":"b3"}'}
    assert "a.jsonl: 8 records" in answer.err and "mix.jsonl: 22 records" in call(
        "dataset", "combine", "mix.jsonl", "a.jsonl:2.5", "b.jsonl:0.5", "--force"
    ).out  # fmt: skip


def test_the_same_call_writes_the_same_bytes_and_another_seed_takes_another_half(call: Call, write: Write) -> None:
    write(lines(*A), "a.jsonl")
    write(lines(*B), "b.jsonl")
    for name, more in {"one": [], "two": [], "other": ["--seed", "7"]}.items():
        assert call("dataset", "combine", f"{name}.jsonl", "a.jsonl", "b.jsonl:0.5", *more).code == 0
    one, two, other = (texts(f"{name}.jsonl") for name in ("one", "two", "other"))
    assert one == two != other
    assert one[:3] != ["a0", "a1", "a2"], "mixed from the beginning on"
    assert [text for text in one if text.startswith("a")] == [record["text"] for record in A], "each in its own order"


def test_a_temperature_evens_out_and_the_mix_stays_as_large(call: Call, write: Write) -> None:
    write(lines(*({"text": "x" * 100} for _ in range(100))), "small.jsonl")
    write(lines(*({"text": "y" * 100} for _ in range(400))), "large.jsonl")
    options = ("small.jsonl", "large.jsonl", "--text-field", "text", "--json")
    facts = json.loads(call("dataset", "combine", "mix.jsonl", *options, "--temperature", "2").out)
    assert [each["records"] for each in facts["sources"]] == [167, 333]
    assert [round(each["planned_share"], 3) for each in facts["sources"]] == [0.333, 0.667]
    plain = json.loads(call("dataset", "combine", "mix.jsonl", *options, "--force").out)
    assert [each["records"] for each in plain["sources"]] == [100, 400], "the control"


def test_the_sources_of_a_phase_with_their_weights(call: Call, write: Write) -> None:
    write(lines(*A), "a.jsonl")
    write(lines(*B, {"text": "b8", "draft": True}), "b.jsonl")
    write("""\
        model: {name: m}
        data: {where: {draft: true}}
        phases:
          - {name: one, sources: a.jsonl}
          - {name: two, sources: [{path: a.jsonl, weight: 0.5}, {path: b.jsonl, weight: 2}], data: {where: {}}}
    """)
    assert call("dataset", "combine", "two.jsonl", "-c", "run.yaml", "--phase", "two").code == 0
    assert Counter(text[0] for text in texts("two.jsonl")) == {"a": 4, "b": 18}
    answer = call("dataset", "combine", "one.jsonl", "-c", "run.yaml", "--phase", "0")
    assert (answer.code, answer.err) == (2, "a.jsonl: no record in it that could be mixed\n"), "data.where leaves none"
    for more, problem in {
        (): "--phase: which one's sources? there are one, two",
        ("a.jsonl", "--phase", "two"): "sources are named twice: with -c they are those of --phase",
        ("--phase", "tow"): "no phase is called 'tow'; did you mean two?",
    }.items():
        answer = call("dataset", "combine", "mix.jsonl", *more, "-c", "run.yaml")
        assert answer.code == 2 and problem in answer.err


def test_any_format_becomes_lines(call: Call, write: Write) -> None:
    write(gzip.compress(lines(*A).encode()), "a.jsonl.gz")
    write("a whole\nfile", "t.txt")
    parquet.write_table(pyarrow.table({"text": ["p0", "p1"], "n": [1, 2]}), "p.parquet")
    assert call("dataset", "combine", "mix.jsonl", "a.jsonl.gz", "t.txt", "p.parquet").code == 0
    found = [json.loads(line) for line in Path("mix.jsonl").read_text().splitlines()]
    assert [record for record in found if record["text"].startswith("p")] == [
        {"text": "p0", "n": 1},
        {"text": "p1", "n": 2},
    ]
    assert {"text": "a whole\nfile"} in found and [each for each in found if each in A] == A


def test_nothing_is_written_over_and_nothing_half_is_left(call: Call, write: Write) -> None:
    write(lines(*A), "a.jsonl")
    write('{"text": "fine"}\n{"text": \n', "bad.jsonl")
    write("kept", "mix.jsonl")
    for words, problem in {
        ("mix.jsonl", "a.jsonl"): "mix.jsonl: it is there already; name another, or add --force",
        ("a.jsonl", "a.jsonl", "--force"): "a.jsonl: it is one of the sources",
        ("mix.json", "a.jsonl"): "a configuration is named with -c",
        ("mix.txt", "a.jsonl"): "mix.txt: a record a line is written; give it a name that ends with .jsonl",
        ("no/mix.jsonl", "a.jsonl"): "no/mix.jsonl: no such folder",
        ("new.jsonl",): "no source is named",
        ("new.jsonl", "a.jsonl:0"): "a.jsonl:0: the weight is 0; allowed: above 0, at most 1000",
        ("new.jsonl", "b.jsonl"): "b.jsonl: no such file or folder",
        ("new.jsonl", "bad.jsonl"): "bad.jsonl, line 2: invalid JSON",
        ("new.jsonl", "a.jsonl", "--text-field", "body"): "a.jsonl, line 1: no field 'body'; there are text, kept",
        ("new.jsonl", "a.jsonl", "--temperature", "0"): "--temperature 0: allowed: above 0, at most 100",
    }.items():
        answer = call("dataset", "combine", *words)
        assert answer.code == 2 and problem in answer.err, (words, answer.err)
    assert sorted(path.name for path in Path().iterdir()) == ["a.jsonl", "bad.jsonl", "mix.jsonl"]
    assert Path("mix.jsonl").read_text() == "kept"


def test_what_is_written_can_be_prepared(call: Call, write: Write) -> None:
    write("", "here")
    mixed = call("dataset", "combine", "mix.jsonl", *(f"{path}:1.5" for path in sorted(SAMPLE.glob("*.jsonl"))))
    assert mixed.code == 0
    assert len(Path("mix.jsonl").read_text().splitlines()) == 223
