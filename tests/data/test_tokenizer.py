"""The tokenizer of a run, from wherever it is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Reference
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from phased_cpt.data.tokenizer import Tokenizer, load_tokenizer
from phased_cpt.errors import InputError
from tests.conftest import SAMPLE, TOKENIZER, Write
from tests.data.conftest import Prepare, lines


def load(name: object, eos: str | None = None) -> Tokenizer:
    return load_tokenizer(str(name), None, eos, Path("cache"))


@pytest.fixture
def folder(write: Write) -> Path:
    """A tokenizer of one's own, to be changed."""
    write((SAMPLE / "tokenizer.json").read_bytes(), "t/tokenizer.json")
    return write((SAMPLE / "tokenizer_config.json").read_bytes(), "t/tokenizer_config.json").parent


def test_a_file_and_a_folder_are_the_same_tokenizer(folder: Path) -> None:
    assert load(folder).digest == load(folder / "tokenizer.json").digest == load(SAMPLE).digest
    assert (load(folder).eos_id, load(folder).pad_id, load(folder).vocabulary) == (0, 3, 4096)


@pytest.mark.requirement("K-01")
def test_a_tokenizer_that_does_not_say_what_ends_a_document_is_refused_with_the_fix(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"t: this tokenizer does not say .*; set model.eos_token to one of: <\|endof"):
        load(folder)
    assert load(folder, eos="<|im_end|>").eos_id == 2
    with pytest.raises(InputError, match=r"t: '</s>' is to end a document, and is not in this tokenizer"):
        load(folder, eos="</s>")


def test_another_end_of_documents_or_another_template_is_another_tokenizer(folder: Path) -> None:
    digest = load(folder).digest
    assert load(folder, eos="<|im_end|>").digest != digest
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load(folder).digest != digest


def with_post_processor(folder: Path) -> None:
    """As Llama 3 has it: a BOS before each text. (And an EOS behind, and a truncation, which are not ours to heed.)"""
    reference = Reference.from_file(str(folder / "tokenizer.json"))
    tokens = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    reference.post_processor = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=tokens)
    reference.enable_truncation(4)
    reference.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("bos", [True, False])
def test_a_tokenizer_that_begins_texts_begins_documents_once(
    folder: Path, prepared: Prepare, write: Write, bos: bool
) -> None:
    """As transformers does it; and a text that brings its BOS along does not get a second one."""
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": not bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if bos:
        with_post_processor(folder)
    theirs = AutoTokenizer.from_pretrained(folder)("some text")["input_ids"]
    assert (theirs[0] == 1) is bos
    write(lines({"text": "some text"}, {"text": "<|im_start|>some text"}), "a.jsonl")
    run = prepared("a.jsonl", set_=("model.tokenizer=t",), parse_special_tokens=True, eval_share=0)
    store = run.phases[0].train.stores[0]
    first, second = (
        store.ids[begin:end].tolist() for begin, end in zip(store.offsets, store.offsets[1:], strict=False)
    )
    plain = [each for each in theirs if each not in (1, 2)]
    assert first == [*[1] * bos, *plain, 0]
    assert second == [1, *plain, 0]


def test_nothing_is_truncated(folder: Path) -> None:
    with_post_processor(folder)
    assert len(load(folder).reference.encode("a b c d e f g h", add_special_tokens=False)) > 4


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"{", "t/tokenizer.json: not a tokenizer.json that can be read: "), (b"[]", "not a tokenizer.json that can be")],
)
def test_a_damaged_file_is_named(folder: Path, content: bytes, problem: str) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=problem):
        load(folder)


def test_what_is_not_there_is_not_asked_of_the_hub_unless_it_is_called_like_that(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("", "x")
    with pytest.raises(InputError, match=r"t.json: no such tokenizer file or folder \(looked from "):
        load("t.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"some/model: no such file or folder, and not to be had from the hub: "):
        load("some/model")


def test_a_model_of_the_hub_is_found_in_its_cache(folder: Path, tmp_path: Path) -> None:
    """The way of huggingface_hub, without a network: the folders that a download leaves behind."""
    model = tmp_path / "hf" / "hub" / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123abc")
    (model / "snapshots").mkdir()
    folder.rename(model / "snapshots" / "0123abc")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    code = "from pathlib import Path; from phased_cpt.data.tokenizer import load_tokenizer; import sys;"
    code += "print(load_tokenizer('some/model', None, None, Path('c')).digest); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == load(SAMPLE).digest, done.stderr


def test_a_folder_without_a_vocabulary_is_no_tokenizer(write: Write, tmp_path: Path) -> None:
    """transformers makes one of nothing but special tokens, and the first text would be the one to say so."""
    write(json.dumps({"model_type": "qwen2"}), "empty/config.json")
    with pytest.raises(
        InputError, match=r"empty: it has no tokenizer.json, .* cannot make one: the folder holds no voc"
    ):
        load_tokenizer("empty", None, None, tmp_path / "cache")


def test_a_repository_without_a_tokenizer_json_gets_one_from_transformers(write: Write) -> None:
    """vocab.json and merges.txt are how older models ship theirs; a child process converts them, once."""
    model = json.loads(TOKENIZER.read_text())["model"]
    merges = ["#version: 0.2", *(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])]
    write(json.dumps(model["vocab"] | {"<|endoftext|>": 0}), "g/vocab.json")
    write("\n".join(merges), "g/merges.txt")
    write('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}', "g/tokenizer_config.json")
    tokenizer = load("g")
    text = "def f(x):\n    return x  # ok é"
    assert tokenizer.reference.encode(text).ids == AutoTokenizer.from_pretrained("g")(text)["input_ids"]
    (made,) = Path("cache/tokenizers").glob("*/tokenizer.json")
    stamp = made.stat().st_mtime_ns
    assert load("g").digest == tokenizer.digest
    assert made.stat().st_mtime_ns == stamp, "once"
    write("x", "h/notes.txt")
    with pytest.raises(InputError, match=r"h: it has no tokenizer.json, and transformers cannot make one: "):
        load("h")


@pytest.mark.parametrize(("vocabulary", "dtype"), [(4096, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary_needs(folder: Path, vocabulary: int, dtype: str) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    if vocabulary > 4096:
        token = {"id": vocabulary - 1, "content": "<|far|>", "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append(token | {"normalized": False, "special": True})
        content["model"]["vocab"]["<|far|>"] = vocabulary - 1
        (folder / "tokenizer.json").write_text(json.dumps(content))
    assert (load(folder).vocabulary, load(folder).dtype) == (vocabulary, dtype)


def test_a_model_with_fewer_rows_than_the_tokenizer_has_ids_is_refused_beforehand(
    prepared: Prepare, write: Write
) -> None:
    write(lines({"text": "x"}), "a.jsonl")
    with pytest.raises(InputError, match=r"the model has vocab_size 100, and the tokenizer .* ids up to 4095; take"):
        prepared("a.jsonl", set_=("model.from_config.vocab_size=100",))
    write('{"model_type": "llama", "vocab_size": 200}', "m/config.json")
    for named in (("model.from_config=m/config.json",), ("model.from_config=null", "model.name=m")):
        with pytest.raises(InputError, match="the model has vocab_size 200"):
            prepared("a.jsonl", set_=named)


def test_without_a_tokenizer_it_is_asked_for(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "x"}), "a.jsonl")
    with pytest.raises(InputError, match=r"model.tokenizer: nothing given; with model.from_config it must be"):
        prepared("a.jsonl", set_=("model.tokenizer=null",))
