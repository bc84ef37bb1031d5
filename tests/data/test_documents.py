"""What is read, and what is refused with file, line, field and reason: the table of bad inputs, one test a row."""

import gzip
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phased_cpt.config import load
from phased_cpt.data.prepare import prepare
from phased_cpt.errors import InputError
from phased_cpt.plan import make_plan
from tests.conftest import Call, Write
from tests.data.conftest import Prepare, lines, texts

GOOD = [{"text": f"document {number} is a good one"} for number in range(3)]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.requirement("D-01", "D-02")
@pytest.mark.parametrize(
    ("record", "text_field"),
    [
        ({"training_content": "wanted", "text": "not this", "type": "file"}, "auto"),
        ({"text": "wanted", "messages": []}, "auto"),
        ({"body": "wanted", "text": "not this"}, "body"),
        ({"instruction": "not this", "output": "nor this", "text": "wanted"}, "auto"),
    ],
)
def test_the_field_of_the_text(prepared: Prepare, write: Write, record: dict[str, str], text_field: str) -> None:
    write(lines(record, record | {"n": 2}), "a.jsonl")
    run = prepared("a.jsonl", text_field=text_field)
    assert texts(run.phases[0], run.tokenizer) == ["wanted", "wanted"]


ACCEPTED: dict[str, tuple[str, bytes, list[str]]] = {
    "no final newline": ("a.jsonl", b'{"text": "x"}\n{"text": "y"}', ["x", "y"]),
    "CRLF": ("a.jsonl", b'{"text": "x"}\r\n{"text": "y"}\r\n', ["x", "y"]),
    "UTF-8 BOM": ("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n{"text": "y"}\n', ["x", "y"]),
    "blank lines": ("a.jsonl", b'\n{"text": "x"}\n \t\n{"text": "y"}\n\n', ["x", "y"]),
    "empty and blank texts": ("a.jsonl", b'{"text": ""}\n{"text": "x"}\n{"text": " \\n"}\n{"text": "y"}\n', ["x", "y"]),
    "line separators inside": ("a.jsonl", '{"text": "x\u2028\u0085\x1cy"}\n'.replace("\x1c", "").encode(), ["x\u2028\u0085y"]),
    "texts that look like dates": ("a.jsonl", b'{"text": "2020-01-01"}\n{"text": "2021-02-03"}\n', ["2020-01-01", "2021-02-03"]),
    "texts that look like numbers": ("a.jsonl", b'{"text": "1"}\n{"text": "2.50"}\n', ["1", "2.50"]),
    "NUL characters": ("a.jsonl", b'{"text": "a\\u0000b"}\n', ["a\0b"]),
    "gzip, called so": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"text": "y"}'), ["x", "y"]),
    "gzip in two members": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n') + gzip.compress(b'{"text": "y"}'), ["x", "y"]),
    "gzip, not called so": ("a.jsonl", gzip.compress(b'{"text": "x"}\n'), ["x"]),
    "zstandard": ("a.jsonl.zst", zstd(b'{"text": "x"}\n{"text": "y"}\n'), ["x", "y"]),
    "zstandard in two frames": ("a.jsonl.zst", zstd(b'{"text": "x"}\n') + zstd(b'{"text": "y"}\n'), ["x", "y"]),
    "zstandard, not called so": ("a.ndjson", zstd(b'{"text": "x"}\n'), ["x"]),
    "a text file": ("a.txt", b"one\n\ntwo\r\n", ["one\n\ntwo\r\n"]),
    "a packed text file": ("a.txt.gz", gzip.compress(b"\xef\xbb\xbfone\ntwo"), ["one\ntwo"]),
}  # fmt: skip


@pytest.mark.requirement("D-03")
@pytest.mark.parametrize(("name", "content", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_read_comes_back_unchanged(
    prepared: Prepare, write: Write, name: str, content: bytes, expected: list[str]
) -> None:
    write(content, name)
    run = prepared(name)
    assert texts(run.phases[0], run.tokenizer) == expected


REFUSED: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"text": "x"}\n{"text": "x"}\n\n{"text" "x"}\n', "a.jsonl:4: invalid JSON: Expecting ':' delimiter at character 9"),
    "a last line that is cut off": (b'{"text": "x"}\n{"text": "x', "a.jsonl:2: invalid JSON: Unterminated string starting at character 10; the file may be incomplete"),
    "UTF-16": ('{"text": "x"}\n'.encode("utf-16"), "a.jsonl:1: the file is UTF-16; save it as UTF-8"),
    "a missing field": (b'{"text": "x"}\n{"body": "x", "id": 3}\n', "a.jsonl:2: missing field 'training_content' or 'text' or 'messages' or 'instruction' (fields here: body, id)"),
    "null": (b'{"text": null}\n', "a.jsonl:1: text: null; needed is a text"),
    "a number": (b'{"text": 3}\n', "a.jsonl:1: text: a JSON number; needed is a text"),
    "a boolean": (b'{"text": true}\n', "a.jsonl:1: text: a JSON boolean; needed is a text"),
    "a list": (b'{"text": ["x"]}\n', "a.jsonl:1: text: a JSON array; needed is a text"),
    "an object": (b'{"text": {"x": 1}}\n', "a.jsonl:1: text: a JSON object; needed is a text"),
    "an array a line": (b'["x"]\n', "a.jsonl:1: a JSON array; needed is one object per line (jq -c '.[]' array.json > lines.jsonl makes lines of an array)"),
    "a text a line": (b'"x"\n', "a.jsonl:1: a JSON text; needed is one object per line"),
    "an object over lines": (b'{\n  "text": "x"\n}\n', "a.jsonl:1: invalid JSON: one value over several lines; needed is one object per line (jq -c '.[]' array.json > lines.jsonl makes lines of an array)"),
    "invalid UTF-8": (b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: invalid UTF-8 at byte 10 of the line"),
    "a lone surrogate": (b'{"text": "x\\ud800"}\n', "a.jsonl:1: half a character (a lone surrogate) at character 2 of the text"),
    "a key given twice": (b'{"text": "x", "text": "y"}\n', "a.jsonl:1: the key 'text' is given twice"),
    "a key given twice further in": (b'{"text": "x", "meta": {"a": 1, "a": 1}}\n', "a.jsonl:1: the key 'a' is given twice"),
    "NaN": (b'{"text": "x", "score": NaN}\n', "a.jsonl:1: NaN is not JSON"),
    "nested too deep": (b'{"text": "x", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "a.jsonl:1: invalid JSON: nested too deep"),
    "a control character": (b'{"text": "x\x01"}\n', "a.jsonl:1: invalid JSON: Invalid control character at character 12"),
    "an empty file": (b"", "a.jsonl: 0 records; the file is empty"),
    "nothing but blanks": (b"\n  \n", "a.jsonl: 0 records; the file is empty"),
    "messages that are a text": (b'{"messages": "x"}\n', "a.jsonl:1: messages: a JSON text; needed is an array of messages"),
    "a message without a role": (b'{"messages": [{"content": "x"}]}\n', 'a.jsonl:1: messages[0]: needed is {"role": "\xe2\x80\xa6", "content": "\xe2\x80\xa6"}'.encode("latin-1").decode()),
    "a message without content": (b'{"messages": [{"role": "user", "content": null}]}\n', "a.jsonl:1: messages[0].content: null; needed is a text"),
    "an instruction without an output": (b'{"instruction": "x"}\n', "a.jsonl:1: missing field 'output' (fields here: instruction)"),
}  # fmt: skip


@pytest.mark.requirement("D-08")
@pytest.mark.parametrize(("content", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_told_with_its_place(
    prepared: Prepare, write: Write, content: bytes, problem: str
) -> None:
    write(content, "a.jsonl")
    with pytest.raises(InputError) as refused:
        prepared("a.jsonl")
    assert str(refused.value).splitlines()[0] == problem
    assert not list(Path("outputs/cache/tokens").glob("*/sealed.json")), "nothing was made of it"


FILES: dict[str, tuple[str, bytes, str, str]] = {
    "a glob that matches nothing": ("a.jsonl", b"", "b*.jsonl", r"run.json:1: phases.phase_0.sources: b\*.jsonl: no file matches \(looked from /.*\)"),
    "a file that is not there": ("a.jsonl", b"", "b.jsonl", r"b.jsonl: no such file or folder \(looked from /.*\); did you mean a.jsonl\?"),
    "a kind that is not known": ("a.csv", b"x", "a.csv", r"a.csv: what kind of file is this\? read are .jsonl, .*"),
    "a folder without data": ("d/a.csv", b"x", "d", r"d: no data files in this folder; there are 1 others, such as a.csv; .*"),
    "a cut gzip file": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 50)[:-9], "a.jsonl.gz", r"a.jsonl.gz: its gzip data end early or are damaged .*"),
    "a cut zstandard file": ("a.jsonl.zst", zstd(b'{"text": "x"}\n' * 50)[:-9], "a.jsonl.zst", r"a.jsonl.zst: its zstd data end early or are damaged .*"),
    "no gzip at all": ("a.jsonl.gz", b'{"text": "x"}\n', "a.jsonl.gz", r"a.jsonl.gz: called .gz, but there is no gzip data in it; .*"),
    "no Parquet at all": ("a.parquet", b"PAR1x", "a.parquet", r"a.parquet: not a Parquet file that can be read: .*"),
    "a .bin without its meta": ("a.bin", b"xx", "a.bin", r"a.bin: a.bin.meta.json is missing; it says how wide the ids are"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "source", "problem"), FILES.values(), ids=FILES)
def test_files_that_cannot_be_used_are_named(
    prepared: Prepare, write: Write, name: str, content: bytes, source: str, problem: str
) -> None:
    write(content, name)
    with pytest.raises(InputError, match=problem):
        prepared(source)


def test_every_source_that_is_not_there_is_told_at_once_with_its_line(write: Write) -> None:
    write(lines(*GOOD), "good.jsonl")
    write("""\
        model: {name: some/model}
        phases:
          - {name: one, sources: [goood.jsonl, good.jsonl]}
          - name: two
            sources: good.jsonl
            eval_sources: missing/*.txt
        """)
    with pytest.raises(InputError) as refused:
        prepare(make_plan(load(Path("run.yaml"))))
    first, second = str(refused.value).splitlines()
    assert first.startswith("run.yaml:3: phases.one.sources: goood.jsonl: no such file or folder (looked from ")
    assert first.endswith("; did you mean good.jsonl?")
    assert second.startswith("run.yaml:6: phases.two.eval_sources: missing/*.txt: no file matches (looked from ")


def test_files_of_a_folder_that_are_no_data_are_told(
    prepared: Prepare, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write(lines(*GOOD), "d/a.jsonl")
    write("x = 1", "d/code.py")
    prepared("d")
    assert "d: 1 files are read; 1 others are no data and left alone, such as code.py" in capsys.readouterr().err


def test_the_first_twenty_problems_are_shown_and_all_are_counted(prepared: Prepare, write: Write) -> None:
    write(lines(*GOOD, *[{"text": number} for number in range(30)]), "a.jsonl")
    with pytest.raises(InputError) as refused:
        prepared("a.jsonl")
    shown = str(refused.value).splitlines()
    assert [line.partition(":")[2].partition(":")[0] for line in shown[:20]] == [str(at) for at in range(4, 24)]
    assert shown[20] == "… and 10 more"
    assert shown[21] == "30 bad records in a.jsonl, and 3 good; mend them, or leave them out: data.on_bad_record: skip"


def test_bad_records_may_be_left_out_up_to_a_share(prepared: Prepare, write: Write) -> None:
    write(lines(*GOOD * 10, {"text": 3}), "a.jsonl")
    run = prepared("a.jsonl", on_bad_record="skip", max_bad_share=0.05)
    assert len(texts(run.phases[0], run.tokenizer)) == 30
    assert run.phases[0].train.stores[0].facts["problems"] == ["a.jsonl:31: text: a JSON number; needed is a text"]
    with pytest.raises(
        InputError, match=r"1 bad record in a.jsonl: 3.2%, more than data.max_bad_share 0.01; mend them, or raise it"
    ):
        prepared("a.jsonl", on_bad_record="skip", max_bad_share=0.01)
    with pytest.raises(InputError, match=r"1 bad record in a.jsonl, and 30 good; mend them"):
        prepared("a.jsonl")


def test_nothing_left_to_train_on_says_why(prepared: Prepare, write: Write) -> None:
    write(lines({"text": " "}, {"text": "x", "type": "commit"}), "a.jsonl")
    with pytest.raises(
        InputError,
        match=r"a.jsonl: no document is left to train on \(2 left out by data.where, 1 of these without such a field\)",
    ):
        prepared("a.jsonl", where={"type": "file"})


@pytest.mark.requirement("D-09")
def test_where_keeps_the_records_that_have_every_value(prepared: Prepare, write: Write) -> None:
    records = [
        {"text": "a", "type": "commit", "merged": True},
        {"text": "b", "type": "commit", "merged": 1},
        {"text": "c", "type": "file", "merged": True},
        {"text": "d"},
        {"text": "e", "type": "commit", "merged": True},
    ]
    write(lines(*records), "a.jsonl")
    run = prepared("a.jsonl", where={"type": "commit", "merged": True})
    assert texts(run.phases[0], run.tokenizer) == ["a", "e"]
    assert run.phases[0].train.stores[0].facts["left_out"] == 3


@pytest.mark.requirement("D-03")
def test_folders_and_globs_are_read_in_the_order_of_their_names(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "b"}), "d/2.jsonl")
    write(lines({"text": "a"}), "d/1.jsonl")
    write(gzip.compress(lines({"text": "c"}).encode()), "d/deep/er/3.jsonl.gz")
    write("d", "d/deep/4.txt")
    write("no data", "d/README.md")
    write(lines({"text": "hidden"}), "d/.git/0.jsonl")
    run = prepared("d", "d/*.jsonl", "d/**/*.gz")
    assert [texts(phase, run.tokenizer) for phase in run.phases] == [["a", "b", "d", "c"], ["a", "b"], ["c"]]


@pytest.mark.requirement("D-03")
def test_parquet_is_read_by_row_groups(prepared: Prepare, write: Write, tmp_path: Path) -> None:
    write("", "x")
    columns = {"text": [f"row {at}" for at in range(10)], "kind": ["a", "b"] * 5, "vector": [[1.0] * 50] * 10}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=3)
    run = prepared("a.parquet", where={"kind": "b"})
    assert texts(run.phases[0], run.tokenizer) == [f"row {at}" for at in (1, 3, 5, 7, 9)]
    chats = [[{"role": "user", "content": "x"}], [{"role": "user", "content": "y"}]]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "b.parquet")
    run = prepared("b.parquet")
    assert texts(run.phases[0], run.tokenizer)[0] == "<|im_start|>user\nx<|im_end|>\n"
    pq.write_table(pa.table({"text": pa.array(["x", None, "y"])}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c.parquet:2: text: null; needed is a text"):
        prepared("c.parquet")
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"d.parquet:1: missing field .* \(fields here: body, n\)"):
        prepared("d.parquet")


def test_many_small_texts_are_read_together_and_told_apart(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phased_cpt.data.files.PIECE_BYTES", 40)
    for number in range(30):
        write(f"text {number:02}", f"d/{number:02}.txt")
    write(lines(*GOOD), "d/15.jsonl")
    run = prepared("d")
    expected = [f"text {number:02}" for number in range(30)]
    expected[15:15] = [record["text"] for record in GOOD]
    assert texts(run.phases[0], run.tokenizer) == expected
    write(b"\xff", "d/07.txt")
    write(b"\xff\xfex", "d/22.txt")
    write(b"", "d/03.txt")
    with pytest.raises(InputError) as refused:
        prepared("d")
    assert str(refused.value).splitlines() == [
        "d/07.txt: invalid UTF-8 at byte 0",
        "d/22.txt: the file is UTF-16; save it as UTF-8",
        "2 bad records in d, and 30 good; mend them, or leave them out: data.on_bad_record: skip",
    ]


def test_lines_are_numbered_in_the_file_wherever_it_was_cut(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phased_cpt.data.files.PIECE_BYTES", 50)
    records = [json.dumps({"text": "x" * (at % 60)}) for at in range(100)]
    records[37] = records[83] = "{"
    write("\n".join(records), "a.jsonl")
    for workers in (1, 3):
        with pytest.raises(InputError) as refused:
            prepared("a.jsonl", workers=workers)
        places = [line.split(": ")[0] for line in str(refused.value).splitlines()]
        assert places[:2] == ["a.jsonl:38", "a.jsonl:84"]
    write(gzip.compress("\n".join(records).encode()), "b.jsonl.gz")
    with pytest.raises(InputError) as refused:
        prepared("b.jsonl.gz")
    assert [line.split(": ")[0] for line in str(refused.value).splitlines()][:2] == ["b.jsonl.gz:38", "b.jsonl.gz:84"]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_line_that_is_too_long_is_a_problem_and_the_ones_behind_it_are_read(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr("phased_cpt.data.files.PIECE_BYTES", 1000)
    monkeypatch.setattr("phased_cpt.data.records.SKIP_BYTES", 300)
    name = "a.jsonl.gz" if packed else "a.jsonl"
    content = lines({"text": "a"}, {"text": "x" * 5000}, {"text": "b"}, {"text": "y" * 990}, {"text": "c"}).encode()
    write(gzip.compress(content) if packed else content, name)
    run = prepared(name, on_bad_record="skip", max_bad_share=0.5, max_line_bytes=1500)
    assert [text[0] for text in texts(run.phases[0], run.tokenizer)] == ["a", "b", "y", "c"]
    problem = f"{name}:2: longer than data.max_line_bytes (1500 bytes)"
    assert run.phases[0].train.stores[0].facts["problems"] == [problem]
    assert len(texts(prepared(name).phases[0], run.tokenizer)) == 5, "the control"


def test_a_gigabyte_without_a_newline_does_not_fill_the_memory(write: Write, config: Callable[..., Path]) -> None:
    """In a process that may not have more than 1.5 GB: what is read of such a line is its limit, and no more."""
    path = write(b"", "a.jsonl")
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(2**30)
    command = [sys.executable, "-m", "phased_cpt", "prepare", "-c", str(config("a.jsonl", max_line_bytes="64MiB"))]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000, 1_500_000_000))

    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, preexec_fn=limit)
    assert "a.jsonl:1: longer than data.max_line_bytes (67108864 bytes)" in done.stderr
    assert done.returncode == 2


def test_a_file_that_changes_while_it_is_read_is_refused(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(lines(*GOOD), "a.jsonl")
    from phased_cpt.data import tokens

    real = tokens._tokenised

    def meddling(*arguments: object) -> object:
        made = real(*arguments)  # type: ignore[arg-type]
        Path("a.jsonl").write_text(lines(*GOOD, *GOOD))
        return made

    monkeypatch.setattr(tokens, "_tokenised", meddling)
    with pytest.raises(InputError, match=r"a.jsonl: the data were changed while they were read"):
        prepared("a.jsonl")
    monkeypatch.setattr(tokens, "_tokenised", real)
    assert len(texts(prepared("a.jsonl").phases[0], prepared("a.jsonl").tokenizer)) == 6


def test_the_message_reaches_the_user_and_the_exit_code_is_2(
    call: Call, write: Write, config: Callable[..., Path]
) -> None:
    write(lines(*GOOD, {"text": None}), "a.jsonl")
    answer = call("prepare", "-c", str(config("a.jsonl")), "--json")
    assert (answer.code, answer.out) == (2, "")
    assert re.match(
        r"a.jsonl:4: text: null; needed is a text\n1 bad record in a.jsonl, and 3 good; mend them", answer.err
    )
