"""What people and programs leave lying about: one message, exit code 2, never a traceback, never other data in silence."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Reference
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from phased_cpt.data.tokenizer import load_tokenizer
from phased_cpt.errors import InputError
from tests.conftest import SAMPLE, TOKENIZER, Call, Write
from tests.data.conftest import Prepare, lines, texts

USER = [{"role": "user", "content": "x"}]


def own_tokenizer(write: Write, template: str | None = None, **config: Any) -> str:
    """The sample's, with another template or other settings."""
    write(TOKENIZER.read_bytes(), "t/tokenizer.json")
    settings = json.loads((SAMPLE / "tokenizer_config.json").read_text()) | config
    if template is not None:
        settings.pop("chat_template")
        write(template, "t/chat_template.jinja")
    write(json.dumps(settings), "t/tokenizer_config.json")
    return "model.tokenizer=t"


# Chat templates are programs of somebody's ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    ["{{ 1/0 }}", "{{ '{5}'.format(1) }}", "{{ 'x'.encode('nope') }}", "{% for x in range(10**9) %}{% endfor %}",
     "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages[0].content | dictsort }}", "{{ [1] | slice(0) | list }}",
     "{% if", "{{ messages[0].role.__class__.__mro__ }}", "{{ '\\ud800' }}"],
)  # fmt: skip
def test_whatever_a_template_does_is_a_bad_record(prepared: Prepare, write: Write, template: str) -> None:
    write(lines({"messages": USER}), "a.jsonl")
    with pytest.raises(InputError, match=r"^a\.jsonl:1: "):
        prepared("a.jsonl", set_=(own_tokenizer(write, template),))


def test_a_template_that_prints_nothing_makes_an_empty_text(prepared: Prepare, write: Write) -> None:
    write(lines({"messages": USER}, {"text": "x"}), "a.jsonl")
    facts = prepared("a.jsonl", set_=(own_tokenizer(write, "{{ none.x }}"),)).phases[0].train.stores[0].facts
    assert (facts["documents"], facts["empty"]) == (1, 1)


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{{ messages[0].content[:8] }}<|im_end|>", "abc <|pad|> and more"),
        ("{{ messages[0].content.split('<|pad|>')[-1] }}<|im_end|>", "a <|pad|> b <|im_end|>"),
        ("{% if messages[0].content.startswith('<|pad|>') %}yes{% else %}no{% endif %}<|im_end|>", "<|pad|> x"),
        ("{{ messages[0].content | length }}<|im_end|>", "a <|pad|>"),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}<|im_end|>", "a <|pad|>"),
    ],
)
def test_a_template_that_looks_into_a_quoted_special_token_is_refused(
    prepared: Prepare, write: Write, template: str, content: str
) -> None:
    setting = own_tokenizer(write, template)
    write(lines({"messages": [{"role": "user", "content": content}]}), "a.jsonl")
    with pytest.raises(InputError, match="the chat template looks into a message that quotes a special token"):
        prepared("a.jsonl", set_=(setting,))
    write(lines({"messages": [{"role": "user", "content": "no token at all in this one"}]}), "a.jsonl")
    assert prepared("a.jsonl", set_=(setting,)).phases[0].train.index.account.documents == 1, "the control"


def test_letters_of_the_private_planes_are_letters(prepared: Prepare, write: Write) -> None:
    content = "\U000f0000 \U000f0001 <|endoftext|> \U000f0001"
    write(lines({"messages": [{"role": "user", "content": content}]}), "a.jsonl")
    run = prepared("a.jsonl")
    assert texts(run.phases[0], run.tokenizer) == [f"<|im_start|>user\n{content}<|im_end|>\n"]
    ids = run.phases[0].train.stores[0].ids.tolist()
    assert [ids.count(token) for token in (0, 1, 2)] == [1, 1, 1]


def test_special_tokens_in_the_names_and_values_of_tool_calls_are_text(prepared: Prepare, write: Write) -> None:
    call = {"arguments": {"<|im_end|>": "<|im_start|>"}}
    write(lines({"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}), "a.jsonl")
    template = "<|im_start|>{{ messages[0].tool_calls | tojson }}<|im_end|>"
    run = prepared("a.jsonl", set_=(own_tokenizer(write, template),))
    ids = run.phases[0].train.stores[0].ids.tolist()
    assert [ids.count(token) for token in (1, 2)] == [1, 1]


def test_a_special_token_of_letters_that_json_escapes_is_found_where_it_is_quoted(
    prepared: Prepare, write: Write
) -> None:
    reference = Reference.from_file(str(TOKENIZER))
    reference.add_special_tokens(['<"odd\\">'])
    setting = own_tokenizer(write, '<"odd\\">{{ messages[0].content }}')
    write(reference.to_str(), "t/tokenizer.json")
    write(lines({"messages": [{"role": "user", "content": 'a <"odd\\"> b'}]}), "a.jsonl")
    store = prepared("a.jsonl", set_=(setting, "model.from_config.vocab_size=5000")).phases[0].train.stores[0]
    assert store.ids.tolist().count(4096) == 1, "the one of the template"
    assert store.facts["special_texts"] == 1


def test_templates_see_what_transformers_shows_them(prepared: Prepare, write: Write) -> None:
    template = "{{ tools is none }} {{ documents is none }} {{ image_token }} {{ 'é' | tojson(false, 2) }}"
    template += "{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %} {{ x }}"
    write(lines({"messages": USER}), "a.jsonl")
    setting = own_tokenizer(write, template, extra_special_tokens={"image_token": "<|pad|>"})
    run = prepared("a.jsonl", set_=(setting,))
    assert texts(run.phases[0], run.tokenizer) == ['True True <|pad|> "é" 1']


def test_chats_that_differ_are_no_copies_and_instructions_are_known_by_their_fields(
    prepared: Prepare, write: Write
) -> None:
    chats = [{"messages": [{"role": "user", "content": f"chat {at}"}]} for at in range(50)]
    write(lines(*chats, *chats[:5]), "a.jsonl")
    run = prepared("a.jsonl")
    assert sum(run.duplicates("phase_0", side) for side in run.phases[0].splits) == 5
    write(lines(*({"instruction": f"do {at}", "output": "done"} for at in range(200))), "b.jsonl")
    held = [
        prepared("b.jsonl", set_=set_).phases[0].splits["eval"].digests.tolist()
        for set_ in ((), (own_tokenizer(write, chat_template=None),))
    ]
    assert held[0] == held[1], "whatever they are rendered with"


def test_a_system_word_of_an_instruction_is_kept_and_one_that_is_no_text_is_told(
    prepared: Prepare, write: Write
) -> None:
    record = {"instruction": "do", "input": "this", "output": "done", "system": "Be brief."}
    write(lines(record), "a.jsonl")
    run = prepared("a.jsonl")
    assert texts(run.phases[0], run.tokenizer)[0].startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ndo\n\nthis"
    )
    for name, value in (("input", 0), ("system", False), ("input", [])):
        write(lines(record | {name: value}), "b.jsonl")
        with pytest.raises(InputError, match=rf"b.jsonl:1: {name}: a JSON \w+; needed is a text"):
            prepared("b.jsonl")


# Records ---------------------------------------------------------------------------------------------------------------


def test_what_a_message_says_of_a_file_is_short_and_on_one_line(prepared: Prepare, write: Write) -> None:
    write(json.dumps({"k" * 100_000 + "\n\x1b[31m": 1, "é\n": 2}) + "\n", "a.jsonl")
    with pytest.raises(InputError) as refused:
        prepared("a.jsonl")
    first = str(refused.value).splitlines()[0]
    assert len(first) < 300
    assert "\x1b" not in first


def test_a_bom_is_one_only_at_the_beginning_and_only_the_last_line_may_be_incomplete(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phased_cpt.data.files.PIECE_BYTES", 20)
    good = b'{"text": "0123456789"}\n'
    write(b"\xef\xbb\xbf" + good + b"\xef\xbb\xbf" + good + b'{"text": "cut\n' + good + b'{"text": "cut', "a.jsonl")
    with pytest.raises(InputError) as refused:
        prepared("a.jsonl")
    told = str(refused.value).splitlines()
    assert [line.split(":")[1] for line in told[:3]] == ["2", "3", "5"]
    assert [line.endswith("may be incomplete") for line in told[:3]] == [False, False, True]


@pytest.mark.parametrize("compressed", [False, True])
def test_the_rest_of_a_line_that_is_too_long_is_no_line(prepared: Prepare, write: Write, compressed: bool) -> None:
    """Also where the limit is larger than what is passed over at once."""
    content = lines({"text": "a"}, {"text": "b"}, {"text": "x" * 5_000_000}, {"text": "c"}).encode() + b"{\n"
    name = "a.jsonl.gz" if compressed else "a.jsonl"
    write(gzip.compress(content, 1) if compressed else content, name)
    with pytest.raises(InputError) as refused:
        prepared(name, max_line_bytes=2_000_000)
    assert [line.split(":")[1] for line in str(refused.value).splitlines()[:-1]] == ["3", "5"]


def test_parquet_that_cannot_be_read_is_named(prepared: Prepare, write: Write, tmp_path: Path) -> None:
    write("", "x")
    raw = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: row group 1 cannot be read: "):
        prepared("a.parquet")
    chats = [[{"role": "user", "content": "x", "at": datetime(2024, 1, 1, tzinfo=UTC), "raw": b"\xff"}]]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "b.parquet")
    assert prepared("b.parquet").phases[0].train.index.account.documents == 1
    pq.write_table(pa.table({"text": [datetime(2024, 1, 1, tzinfo=UTC)]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c.parquet:1: text: a JSON datetime; needed is a text"):
        prepared("c.parquet")


def test_a_text_file_is_read_whatever_field_the_records_of_others_have(prepared: Prepare, write: Write) -> None:
    write("plain", "d/a.txt")
    write(lines({"body": "record"}), "d/b.jsonl")
    run = prepared("d", text_field="body")
    assert texts(run.phases[0], run.tokenizer) == ["plain", "record"]


def test_a_text_that_is_too_long_is_told(prepared: Prepare, write: Write) -> None:
    write("x" * 3000, "a.txt")
    write(gzip.compress(b"x" * 3000), "b.txt.gz")
    for name in ("a.txt", "b.txt.gz"):
        with pytest.raises(InputError, match=f"{name}: a text longer than data.max_line_bytes .2000 bytes.; split it"):
            prepared(name, max_line_bytes=2000)


def test_names_that_are_no_text_are_bad_records_and_can_be_left_out(prepared: Prepare, write: Write) -> None:
    write(b'{"\\ud800": 1}\n' + lines({"text": "x"}).encode(), "a.jsonl")
    run = prepared("a.jsonl", on_bad_record="skip", max_bad_share=0.9)
    assert texts(run.phases[0], run.tokenizer) == ["x"]
    deep: Any = "x"
    for _ in range(800):
        deep = [deep]
    write(
        lines({"messages": [{"role": "assistant", "content": "<|pad|>", "tool_calls": deep}]}, {"text": "x"}), "b.jsonl"
    )
    run = prepared("b.jsonl", on_bad_record="skip", max_bad_share=0.9)
    assert texts(run.phases[0], run.tokenizer)[-1] == "x"


# Files -----------------------------------------------------------------------------------------------------------------


def test_what_is_neither_a_file_nor_a_folder_is_not_waited_for(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "x"}), "a.jsonl")
    os.mkfifo("pipe.jsonl")
    Path("zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.jsonl"):
        with pytest.raises(InputError, match=rf"{name}: neither a file nor a folder"):
            prepared(name)
    os.mkfifo("tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer.json: neither a file nor a folder"):
        prepared("a.jsonl", set_=("model.tokenizer=tokenizer.json",))
    with pytest.raises(InputError, match=r"~nobody-here/x.jsonl: there is no such user"):
        prepared("~nobody-here/x.jsonl")


def test_links_are_followed_once_and_one_that_leads_nowhere_is_told(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "inside"}), "d/a.jsonl")
    write(lines({"text": "linked"}), "elsewhere/b.jsonl")
    Path("d/link").symlink_to(Path("elsewhere").resolve())
    Path("d/loop").symlink_to(Path("d").resolve())
    run = prepared("d")
    assert texts(run.phases[0], run.tokenizer) == ["inside", "linked"]
    Path("d/c.jsonl").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"d/c.jsonl: a link that leads nowhere"):
        prepared("d")


def test_a_frame_to_be_skipped_may_begin_a_zstandard_file(prepared: Prepare, write: Write) -> None:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(b'{"text": "x"}\n')
    write(b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + sink.getvalue().to_pybytes(), "a.jsonl.zst")
    assert prepared("a.jsonl.zst").phases[0].train.index.account.documents == 1


def test_a_file_has_no_split(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "x"}), "a.jsonl")
    with pytest.raises(InputError, match=r"a.jsonl: this is a file, and a file has no split; take `split: train` out"):
        prepared("a.jsonl", set_=("phases.0.sources={path: a.jsonl, split: train}",))


# Tokenizers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "tokenizer_config.json",
            b'{"eos_token": "<|pad|>", "chat_template": [{"template": "x"}]}',
            "t: its chat template cannot be read: ",
        ),
        (
            "tokenizer_config.json",
            b'{"eos_token": "<|pad|>", "chat_template": ["x"]}',
            "t: its chat template cannot be read: ",
        ),
        ("chat_template.jinja", b"\xff", "t: its chat template cannot be read: "),
        ("tokenizer_config.json", b"[" * 100_000, "t/tokenizer_config.json: not JSON that can be read: "),
        ("tokenizer_config.json", b"5", "t/tokenizer_config.json: not JSON that can be read: "),
    ],
)
def test_odd_settings_of_a_tokenizer_are_told(
    write: Write, tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    own_tokenizer(write)
    write(content, f"t/{name}")
    with pytest.raises(InputError, match=problem):
        load_tokenizer("t", None, None, tmp_path)


def test_the_default_of_several_templates_is_taken(prepared: Prepare, write: Write) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    write(lines({"messages": USER}), "a.jsonl")
    run = prepared("a.jsonl", set_=(own_tokenizer(write, chat_template=several),))
    assert texts(run.phases[0], run.tokenizer) == ["x"]


def test_a_tokenizer_that_does_not_know_a_word_is_named(prepared: Prepare, write: Write) -> None:
    reference = Reference(WordLevel({"x": 0, "<eos>": 1}, unk_token="[UNK]"))
    reference.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    reference.add_special_tokens(["<eos>"])
    write(reference.to_str(), "w.json")
    write(lines({"text": "x y"}), "a.jsonl")
    with pytest.raises(InputError, match=r"w.json: this tokenizer cannot tokenise these texts: .*UNK"):
        prepared("a.jsonl", set_=("model.tokenizer=w.json", "model.eos_token=<eos>"))


@pytest.mark.parametrize(
    "odd", [AddedToken("<mask>", lstrip=True), AddedToken("zebra", single_word=True), AddedToken("  ", normalized=True)]
)
def test_added_tokens_that_depend_on_what_stands_beside_them_are_the_reference_s(
    prepared: Prepare, write: Write, capsys: pytest.CaptureFixture[str], odd: AddedToken
) -> None:
    reference = Reference.from_file(str(TOKENIZER))
    reference.add_tokens([AddedToken("plain", normalized=False), odd])
    own_tokenizer(write)
    write(reference.to_str(), "t/tokenizer.json")
    documents = ["  <mask> a zebra zebras", "plain  x", "a\n  <mask>"]
    write(lines(*({"text": text} for text in documents)), "a.jsonl")
    shape = "model.from_config.vocab_size=5000"
    store = prepared("a.jsonl", set_=("model.tokenizer=t", shape), eval_share=0).phases[0].train.stores[0]
    reference.encode_special_tokens = True
    assert store.ids.tolist() == [each for text in documents for each in [*reference.encode(text).ids, 0]]
    assert store.facts["backend"] == "tokenizers"
    assert "depends on what stands beside it" in capsys.readouterr().err


def test_a_tokenizer_that_throws_dice_does_not_throw_them_here(prepared: Prepare, write: Write) -> None:
    content = json.loads(TOKENIZER.read_text())
    content["model"]["dropout"] = 0.5
    own_tokenizer(write)
    write(lines({"text": "some words that could be cut in many ways"}), "a.jsonl")
    one = prepared("a.jsonl", set_=("model.tokenizer=t",)).phases[0].train.stores[0].ids.tolist()
    write(json.dumps(content), "t/tokenizer.json")
    assert prepared("a.jsonl", set_=("model.tokenizer=t",)).phases[0].train.stores[0].ids.tolist() == one


def test_a_beginning_of_several_tokens_is_there_or_is_put_there_whole(prepared: Prepare, write: Write) -> None:
    reference = Reference.from_file(str(TOKENIZER))
    begin = [("<|im_start|>", 1), ("<|pad|>", 3)]
    reference.post_processor = TemplateProcessing(single="<|im_start|> <|pad|> $A", special_tokens=begin)  # type: ignore[assignment]
    own_tokenizer(write)
    write(reference.to_str(), "t/tokenizer.json")
    documents = ["x", "<|im_start|>x", "<|im_start|><|pad|>x", "x<|pad|>", "<|im_start|>"]
    write(lines(*({"text": text} for text in documents)), "a.jsonl")
    set_ = ("model.tokenizer=t",)
    store = prepared("a.jsonl", set_=set_, parse_special_tokens=True, eval_share=0).phases[0].train.stores[0]
    x = reference.encode("x", add_special_tokens=False).ids
    each = [ids.tolist() for ids in np.split(store.ids, store.offsets[1:-1])]
    assert each == [[1, 3, *x, 0], [1, 3, 1, *x, 0], [1, 3, *x, 0], [1, 3, *x, 3, 0], [1, 3, 1, 0]]


def test_an_end_that_is_an_ordinary_word_is_still_put_behind_every_document(prepared: Prepare, write: Write) -> None:
    newline = Reference.from_file(str(TOKENIZER)).token_to_id("Ċ")
    write(lines({"text": "x\n"}, {"text": "x"}), "a.jsonl")
    store = prepared("a.jsonl", set_=("model.eos_token=Ċ",), eval_share=0).phases[0].train.stores[0]
    assert next(ids.tolist()[-2:] for ids in np.split(store.ids, store.offsets[1:-1])) == [newline, newline]
    assert store.facts["documents"] == 2


# Tokens as files ---------------------------------------------------------------------------------------------------------


def test_a_bin_and_its_meta_are_one_source(prepared: Prepare, write: Write) -> None:
    """A wrong width that was mended must not live on in the cache."""
    write(np.array([5, 0, 6, 0], np.uint32).tobytes(), "a.bin")
    write('{"dtype": "uint16"}', "a.bin.meta.json")
    assert len(prepared("a.bin").phases[0].train.stores[0].ids) == 8
    write('{"dtype": "uint32"}', "a.bin.meta.json")
    assert prepared("a.bin").phases[0].train.stores[0].ids.tolist() == [5, 0, 6, 0]
    Path("a.bin.meta.json").unlink()
    with pytest.raises(InputError, match=r"a.bin.meta.json is missing"):
        prepared("a.bin")


def test_tokens_and_texts_of_one_folder_come_in_order(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phased_cpt.data.bin.CHECKED_AT_ONCE", 3)
    write(lines({"text": "a"}), "d/1.jsonl")
    write(np.array([70, 71, 72, 73, 0, 74, 0], np.uint16).tobytes(), "d/2.bin")
    write('{"dtype": "uint16"}', "d/2.bin.meta.json")
    write(lines({"text": "b"}), "d/3.jsonl")
    write(np.array([70, 71, 72, 73, 0], np.uint32).tobytes(), "d/4.bin")
    write('{"dtype": "uint32"}', "d/4.bin.meta.json")
    run = prepared("d", eval_share=0)
    store = run.phases[0].train.stores[0]
    each = [ids.tolist()[:-1] for ids in np.split(store.ids, store.offsets[1:-1])]
    a, b = (run.tokenizer.reference.encode(letter).ids for letter in "ab")
    assert each == [a, [70, 71, 72, 73], [74], b, [70, 71, 72, 73]]
    assert run.duplicates("phase_0", "train") == 1, "the same tokens, however wide they are written"


# The cache ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["[]", "5", "null", '"x"', "[" * 99999, '{"path": 5}', "{"])
def test_a_memory_of_digests_that_is_damaged_is_no_memory(prepared: Prepare, write: Write, damage: str) -> None:
    write(lines({"text": "x"}), "a.jsonl")
    os.utime("a.jsonl", (1, 1))
    prepared("a.jsonl")
    (memory,) = Path("outputs/cache/sources").iterdir()
    memory.write_text(damage.replace("path", str(Path("a.jsonl").resolve())))
    assert prepared("a.jsonl").phases[0].train.cached


def test_a_file_is_read_for_its_digest_once_unless_it_is_young(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phased_cpt.data import cache

    read: list[str] = []
    real = cache.sha256_of
    monkeypatch.setattr(cache, "sha256_of", lambda path: (read.append(path.name), real(path))[1])
    write(lines({"text": "x"}), "a.jsonl")
    for old, times in ((False, 2), (True, 1)):
        read.clear()
        if old:
            os.utime("a.jsonl", (1, 1))
        for _ in range(2):
            prepared("a.jsonl")
        assert read.count("a.jsonl") == times


@pytest.mark.parametrize("facts", [{}, 5, {"documents": 9}], ids=str)
def test_a_seal_that_was_changed_seals_nothing(prepared: Prepare, write: Write, facts: object) -> None:
    write(lines({"text": "x"}), "a.jsonl")
    prepared("a.jsonl")
    for kind in ("tokens", "blocks"):
        (seal,) = Path(f"outputs/cache/{kind}").glob("[!.]*/sealed.json")
        content = json.loads(seal.read_text())
        seal.write_text(json.dumps(content | {"facts": facts}))
        run = prepared("a.jsonl")
        assert run.phases[0].train.index.account.documents == 1
        assert json.loads(seal.read_text()) == content
        seal.unlink()
        seal.mkdir()
        assert prepared("a.jsonl").phases[0].train.index.account.documents == 1


def test_a_file_that_changes_after_it_was_hashed_is_not_kept_under_its_old_name(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phased_cpt.data import tokens

    write(lines({"text": "old"}), "a.jsonl")
    real = tokens.file_digests

    def meddling(paths: list[Path], memory: Path) -> list[str]:
        digests = real(paths, memory)
        Path("a.jsonl").write_text(lines({"text": "new"}))
        return digests

    monkeypatch.setattr(tokens, "file_digests", meddling)
    with pytest.raises(InputError, match="the data were changed while they were read"):
        prepared("a.jsonl")
    monkeypatch.setattr(tokens, "file_digests", real)
    write(lines({"text": "old"}), "a.jsonl")
    run = prepared("a.jsonl")
    assert texts(run.phases[0], run.tokenizer) == ["old"]


def test_a_cache_that_is_deleted_while_it_is_made_is_told_and_nothing_is_mixed_up(
    prepared: Prepare, call: Call, write: Write, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from phased_cpt.data import tokens

    real = tokens._tokenised

    def deleting(*arguments: Any) -> Any:
        made = real(*arguments)
        shutil.rmtree("outputs/cache")
        return made

    monkeypatch.setattr(tokens, "_tokenised", deleting)
    write(lines({"text": "x"}), "a.jsonl")
    answer = call("prepare", "-c", str(config("a.jsonl")))
    assert answer.code == 1
    assert "deleted while it was written to" in answer.err
    monkeypatch.setattr(tokens, "_tokenised", real)
    assert call("prepare", "-c", "run.json").code == 0


def test_what_other_killed_builds_have_left_is_taken_away(prepared: Prepare, write: Write) -> None:
    left = Path("outputs/cache/tokens/.0123.abcd.building")
    write("half", str(left / "ids.bin"))
    write(lines({"text": "x"}), "a.jsonl")
    prepared("a.jsonl")
    assert not left.exists()


def test_bad_records_are_told_by_the_names_that_files_have_today(prepared: Prepare, write: Write) -> None:
    write(lines({"text": 3}, {"text": "x"}), "a.jsonl")
    prepared("a.jsonl", on_bad_record="skip", max_bad_share=0.9)
    Path("a.jsonl").rename("b.jsonl")
    with pytest.raises(InputError, match=r"^b.jsonl:1: text: a JSON number; needed is a text"):
        prepared("b.jsonl")


def test_weights_and_rows_have_limits_that_are_told(call: Call, config: Callable[..., Path]) -> None:
    config("a.jsonl")
    for override in ("phases.0.sources={path: a.jsonl, weight: 1e300}", f"data.max_tokens={10**18}"):
        answer = call("prepare", "-c", "run.json", "--set", override)
        assert answer.code == 2
        assert "allowed: a" in answer.err
