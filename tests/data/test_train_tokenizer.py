"""A tokenizer of one's own: it gives every text back, is the same everywhere, and never takes another's place."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer as Reference
from tokenizers import normalizers
from tokenizers.pre_tokenizers import ByteLevel

from phased_cpt.data import train_tokenizer as module
from phased_cpt.data.backends import NASTY
from phased_cpt.data.cache import Facts
from phased_cpt.data.tokenizer import load_tokenizer
from phased_cpt.data.train_tokenizer import SPECIAL, files_of, train_tokenizer, trained, words_of_code, words_of_gpt2
from phased_cpt.errors import InputError
from tests.conftest import REPOSITORY, SAMPLE, Write
from tests.data.conftest import lines

FOUNDATION, EVOLUTION, REVIEWS = sorted(SAMPLE.glob("phase*.jsonl"))
CODE = "def f(x):\n    return x + 1\n\n\ndef g(x):\n    return f(x) + 10\n" * 3
OTHER = "\tyes\r\n\tno\r\n" * 9

# Every byte that UTF-8 can hold, and what a normaliser, a careless pattern or a cleaner of blanks would change.
ROUND = (
    *NASTY,
    *("\tif x:\r\n\t\treturn\t1\r\n", "a\x00b\x00\x00", "\u0301", "\u0301\u0301 x\u0308", "é e\u0301 Å Å ﬁ"),
    *("x = 1 , 2 . n't 're 's !", "日本語 und Ελληνικά и العربية", "👩‍👩‍👧‍👦🏳️‍🌈", "\ufeff#!/bin/sh", "  \u2028\u2029\x85\u00a0 "),
    *("<|endoftext|><|im_start|>user", "1234567890", " " * 17 + "x", "\n" * 9, "\r\r\n\n\r"),
    "".join(chr(point) for point in [*range(0x900), *range(0x900, 0x110000, 61)] if not 0xD800 <= point < 0xE000),
)  # fmt: skip


class Told(list[str]):
    """What the user was told."""

    def __call__(self, message: str) -> None:
        self.append(message)


def train(
    *sources: object, vocabulary: int = 300, output: str = "made", text_field: str = "auto"
) -> tuple[Facts, Told]:
    told = Told()
    facts = train_tokenizer(list(map(str, sources)), Path(output), vocabulary, text_field=text_field, tell=told)
    return facts, told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the sample's files."""
    folder = tmp_path_factory.mktemp("tokenizer") / "new"
    train(FOUNDATION, vocabulary=1000, output=str(folder))
    return folder


def plain(reference: Reference, text: str) -> list[int]:
    reference.encode_special_tokens = True
    return list(reference.encode(text, add_special_tokens=False).ids)


# What is made --------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("K-09")
@pytest.mark.parametrize("text", ROUND, ids=lambda text: ascii(text[:12]))
def test_any_text_comes_back_as_it_was(folder: Path, text: str) -> None:
    reference = load_tokenizer(str(folder), None, None, folder).reference
    assert reference.decode(plain(reference, text), skip_special_tokens=False) == text


def test_a_normaliser_would_not_have_given_every_text_back(folder: Path) -> None:
    """The control: with one, the texts above do not all come back. And they hold every byte that a text can hold."""
    reference = Reference.from_file(str(folder / "tokenizer.json"))
    assert all(reference.decode(plain(reference, text), skip_special_tokens=False) == text for text in ROUND)
    reference.normalizer = normalizers.NFC()
    assert not all(reference.decode(plain(reference, text), skip_special_tokens=False) == text for text in ROUND)
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert set("".join(ROUND).encode()) == set(range(256)) - never


def test_the_first_ids_are_the_special_tokens_and_then_every_byte(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), None, None, folder)
    entries = tokenizer.reference.get_vocab(with_added_tokens=True)
    by_id = sorted(entries, key=entries.__getitem__)
    assert tuple(by_id[:4]) == SPECIAL
    assert sorted(by_id[4:260]) == sorted(ByteLevel.alphabet())
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocabulary, tokenizer.prefix) == (0, 3, 1000, ())
    assert by_id[260] not in ByteLevel.alphabet(), "the first that was learned"


def words(splitter: Callable[[], object], text: str) -> list[str]:
    return [text[begin:end] for _, (begin, end) in splitter().pre_tokenize_str(text)]  # type: ignore[attr-defined]


def test_words_are_those_of_code() -> None:
    text = "if x1 == 2048:\n\n        y"
    assert words(words_of_code, text) == ["if", " x", "1", " ==", " ", "2", "0", "4", "8", ":\n\n", "       ", " y"]
    assert words(words_of_gpt2, text) == ["if", " x", "1", " ==", " 2048", ":", "\n\n       ", " y"]


TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
texts, chat = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = [tokenizer(text, split_special_tokens=special)["input_ids"] for text in texts for special in (True, False)]
back = [tokenizer.decode(each) for each in ids[::2]]
written = tokenizer.apply_chat_template(chat, tokenize=False)
json.dump([ids, back, written, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)], sys.stdout)
"""


def test_transformers_gives_the_same_ids(folder: Path) -> None:
    """In a process of its own: the import of transformers would slow down the tests beside this one."""
    chat = [{"role": "user", "content": "x?"}, {"role": "assistant", "content": "y"}]
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, str(folder)],
        input=json.dumps([ROUND, chat]),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    ids, back, written, *numbers = json.loads(done.stdout)
    ours = load_tokenizer(str(folder), None, None, folder).reference
    for at, text in enumerate(ROUND):
        assert ids[2 * at] == plain(ours, text)
        ours.encode_special_tokens = False
        assert ids[2 * at + 1] == ours.encode(text).ids
    assert ids[::2] != ids[1::2], "a text that quotes special tokens is among them"
    assert tuple(back) == ROUND
    assert written == "<|im_start|>user\nx?<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
    assert numbers == [0, 3, 1000]


def test_the_figures_are_those_of_the_texts(write: Write) -> None:
    write(lines({"text": CODE}, {"text": "é\n"}, {"text": ""}), "a.jsonl")
    facts, _ = train("a.jsonl", vocabulary=275)
    assert (facts["output"], facts["documents"], facts["bytes"]) == ("made", 2, len(CODE) + 3)
    reference = Reference.from_file("made/tokenizer.json")
    assert facts["vocabulary"] == reference.get_vocab_size() == 275
    tokens = sum(len(plain(reference, text)) for text in (CODE, "é\n"))
    assert facts["bytes_per_token"] == pytest.approx((len(CODE) + 3) / tokens)
    assert 0 < facts["seconds"] < 60


# The same everywhere -------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_the_sample_is_made_again_byte_for_byte() -> None:
    each = (path.read_text(encoding="utf-8").splitlines() for path in (FOUNDATION, EVOLUTION, REVIEWS))
    texts = [json.loads(line)["training_content"] for file in each for line in file]
    made = files_of(trained(texts, 4096, words_of_gpt2()), model_max_length=1024)
    assert made == {name: (SAMPLE / name).read_bytes() for name in ("tokenizer_config.json", "tokenizer.json")}
    other = files_of(trained(texts[1:], 4096, words_of_gpt2()), model_max_length=1024)
    assert other["tokenizer.json"] != made["tokenizer.json"]


IN_A_PROCESS = """
import sys
from pathlib import Path
from phased_cpt.data.train_tokenizer import train_tokenizer
train_tokenizer(sys.argv[2:], Path(sys.argv[1]), 1000, tell=print)
"""


def test_the_number_of_cores_changes_nothing(folder: Path, tmp_path: Path) -> None:
    made = {}
    for threads, sources in {"1": [FOUNDATION], "3": [FOUNDATION], "2": [EVOLUTION]}.items():
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(REPOSITORY)}
        environment |= {"TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / threads), *map(str, sources)]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        made[threads] = (tmp_path / threads / "tokenizer.json").read_bytes()
    assert made["1"] == made["3"] == (folder / "tokenizer.json").read_bytes()
    assert made["2"] != made["1"], "other texts"


def test_every_format_is_read_as_prepare_reads_it(write: Write) -> None:
    """The same texts in another file are the same tokenizer; other texts are another."""
    write(lines({"text": CODE}, {"text": OTHER}), "a/a.jsonl")
    write(gzip.compress(lines({"body": "no", "training_content": CODE}, {"text": OTHER}).encode()), "b.json.gz")
    write(CODE.encode(), "c/1.txt")
    write(OTHER.encode(), "c/2.txt")
    pq.write_table(pa.table({"text": [CODE, OTHER], "n": [1, 2]}), "d.parquet")
    write(lines({"body": CODE}, {"body": OTHER}), "e.jsonl")
    made = {}
    for source in ("a", "b.json.gz", "c/*.txt", "d.parquet", "e.jsonl"):
        train(source, output=f"made/{source[0]}", text_field="body" if source == "e.jsonl" else "auto")
        made[source] = Path(f"made/{source[0]}/tokenizer.json").read_bytes()
    assert len(set(made.values())) == 1
    train("c/1.txt", "c/2.txt", output="made/f")
    train("c/1.txt", "c/1.txt", output="made/g")
    assert Path("made/f/tokenizer.json").read_bytes() == made["a"]
    assert Path("made/g/tokenizer.json").read_bytes() != made["a"]


def test_of_chats_and_instructions_the_contents_are_learned(write: Write) -> None:
    chat = [{"role": "user", "content": CODE}, {"role": "assistant", "content": "<|im_end|> x"}]
    roles = f"user\n{CODE}\nassistant\n<|im_end|> x\n"
    write(lines(*[{"messages": chat}] * 3), "chat.jsonl")
    write(lines(*[{"instruction": CODE, "output": "<|im_end|> x"}] * 3), "alpaca.jsonl")
    write(lines(*[{"text": f"{CODE}\n<|im_end|> x\n"}] * 3), "text.jsonl")
    write(lines(*[{"text": roles}] * 3), "roles.jsonl")
    made = [train(f"{name}.jsonl", output=name) and Path(name, "tokenizer.json").read_bytes()
            for name in ("text", "chat", "alpaca", "roles")]  # fmt: skip
    assert made[0] == made[1] == made[2] != made[3]


def test_a_long_text_is_handed_over_in_parts_and_none_is_lost(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library holds at once does not depend on how long a document is."""
    parts: list[list[str]] = []

    def counted(texts: list[str], *rest: object) -> Reference:
        parts.append(list(texts))
        return trained(parts[-1], *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "trained", counted)
    long = CODE + "x" * 250 + "\n" + CODE
    write(lines({"text": long}, {"text": "short"}), "a.jsonl")
    train("a.jsonl", output="whole")
    monkeypatch.setattr(module, "LONGEST_TEXT", 100)
    facts, _ = train("a.jsonl", output="cut")
    assert parts[0] == [long, "short"]
    assert "".join(parts[1][:-1]) == long
    assert max(map(len, parts[1])) == 100
    assert parts[1][0].endswith("\n")
    assert (facts["documents"], facts["bytes"]) == (2, len(long) + 5)


def test_of_a_large_corpus_a_sample_is_measured_from_everywhere_in_it(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(lines(*[{"text": "ab" * 50}] * 500, *[{"text": "?é!z" * 25}] * 500), "a.jsonl")
    whole, _ = train("a.jsonl", vocabulary=262, output="whole")
    monkeypatch.setattr(module, "MEASURED", 4000)
    measured: list[list[str]] = []
    bytes_per_token = module._bytes_per_token
    monkeypatch.setattr(module, "_bytes_per_token", lambda *a: measured.append(a[1]) or bytes_per_token(*a))  # type: ignore[func-returns-value]
    part, _ = train("a.jsonl", vocabulary=262, output="part")
    assert 20 <= len(measured[0]) <= 40
    assert part["bytes_per_token"] == pytest.approx(whole["bytes_per_token"], rel=0.1)


def test_how_far_it_has_come_is_told_now_and_then(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(lines({"text": CODE}, {"text": CODE}), "a.jsonl")
    end = f"2 documents, {2 * len(CODE) / 1e6:.1f} MB are read; now the most frequent pairs are merged"
    assert train("a.jsonl", vocabulary=270)[1] == [end]
    monkeypatch.setattr(module, "TELL_SECONDS", 0)
    assert train("a.jsonl", vocabulary=270, output="again")[1] == [
        "1 document, 0.0 MB are read",
        "2 documents, 0.0 MB are read",
        end,
    ]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [-1, 0, 259, 2**20 + 1, 10**15])
def test_a_vocabulary_without_room_for_every_byte_is_refused(write: Write, vocabulary: int) -> None:
    write(lines({"text": CODE}), "a.jsonl")
    refusal = rf"^--vocabulary {vocabulary}: allowed: 260 \(every byte, and 4 special tokens\) to 1048576; for a small "
    with pytest.raises(InputError, match=refusal + "model: --vocabulary 4096$"):
        train("a.jsonl", vocabulary=vocabulary)
    assert not Path("made").exists()
    assert train("a.jsonl", vocabulary=260)[0]["vocabulary"] == 260


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"])
def test_another_tokenizer_is_left_as_it_is(write: Write, name: str) -> None:
    write(lines({"text": CODE}), "a.jsonl")
    write(b"precious", f"made/{name}")
    with pytest.raises(InputError, match=rf"^--output made: it holds a tokenizer already \({name}\); name another"):
        train("a.jsonl")
    assert {path.name: path.read_bytes() for path in Path("made").iterdir()} == {name: b"precious"}


def test_one_that_appears_meanwhile_is_left_as_it_is_too(write: Write) -> None:
    write(lines({"text": CODE}), "a.jsonl")

    def somebody(message: str) -> None:
        write(b"precious", "made/tokenizer.json")

    with pytest.raises(InputError, match="it holds a tokenizer already"):
        train_tokenizer(["a.jsonl"], Path("made"), 270, tell=somebody)
    assert [path.read_bytes() for path in Path("made").iterdir()] == [b"precious"]


def test_beside_a_model_there_is_room_for_its_tokenizer(write: Write) -> None:
    write(lines({"text": CODE}), "a.jsonl")
    write(b"{}", "made/config.json")
    train("a.jsonl")
    assert sorted(path.name for path in Path("made").iterdir()) == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


REFUSED = {
    "a bad record": (b'{"text": "x"}\n\n{"text": 3}\n{"text": "y"}\n', "auto", r"^a.jsonl:3: text: a JSON number; needed is a text\n1 bad record in a.jsonl, and 2 good; mend them, or take them out$"),
    "many bad records": (b'{"text": 3}\n' * 30, "auto", r"a.jsonl:20: .*\n… and 10 more\n30 bad records in a.jsonl, and 0 good; "),
    "half a character": (b'{"text": "\\ud800"}\n', "auto", "a.jsonl:1: half a character"),
    "another field": (b'{"text": "x"}\n', "txt", r"a.jsonl:1: missing field 'txt'; did you mean text\? "),
    "an empty file": (b"", "auto", "a.jsonl: 0 records; the file is empty"),
    "empty texts": (b'{"text": ""}\n{"text": " "}\n', "auto", "^a.jsonl: no document to train on; all its texts are empty$"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "text_field", "refusal"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_told_and_nothing_is_written(
    write: Write, content: bytes, text_field: str, refusal: str
) -> None:
    write(content, "a.jsonl")
    write(lines({"text": CODE, "txt": CODE}), "good.jsonl")
    with pytest.raises(InputError, match=refusal):
        train("good.jsonl", "a.jsonl", text_field=text_field)
    assert not list(Path("made").iterdir())
    train("good.jsonl", text_field=text_field)
    assert len(list(Path("made").iterdir())) == 2


def test_lines_are_counted_over_the_pieces_of_a_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phased_cpt.data.files.PIECE_BYTES", 64)
    write(lines(*[{"text": "good"}] * 40, {"text": None}), "a.jsonl")
    with pytest.raises(InputError, match=r"^a.jsonl:41: text: null; needed is a text\n"):
        train("a.jsonl")


def test_a_source_that_is_none_is_refused_before_a_folder_is_made(write: Write) -> None:
    write(b"\0\0", "t.bin")
    with pytest.raises(
        InputError, match=r"^t.bin: tokens of another tokenizer; name the texts that they were made of$"
    ):
        train("t.bin")
    with pytest.raises(InputError, match=r"^b.jsonl: no such file or folder"):
        train("b.jsonl")
    with pytest.raises(InputError, match=r"^no source is named"):
        train()
    assert not Path("made").exists()


def test_a_small_corpus_gives_fewer_entries_and_says_so(write: Write) -> None:
    write(lines({"text": "ab ab xyz"}), "a.jsonl")
    facts, told = train("a.jsonl", vocabulary=4096)
    assert facts["vocabulary"] == 261, "the pair ab, and no other occurs twice"
    assert told[-1] == "261 entries, and not 4,096: no pair is left that occurs twice; more text gives more"
    assert "entries" not in "".join(train("a.jsonl", vocabulary=261, output="exact")[1])


def test_more_than_the_library_can_count_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers 0.23 counts a pair in 32 bits: with 2.2 GB of the letter a, `aa` became no entry."""
    write(lines({"text": CODE}), "a.jsonl")
    monkeypatch.setattr(module, "COUNTABLE", len(CODE) - 1)
    with pytest.raises(InputError, match=r"^more than 0.0 GB of text, which cannot be counted; name a part of it"):
        train("a.jsonl")
    monkeypatch.setattr(module, "COUNTABLE", len(CODE))
    assert train("a.jsonl")[0]["bytes"] == len(CODE)


STOPPED = """
import os, signal, sys
from pathlib import Path
from phased_cpt.data.train_tokenizer import train_tokenizer
if sys.argv[3] == "mine":
    signal.signal(signal.SIGINT, lambda *_: print("heard"))

def stop(message):
    os.kill(os.getpid(), signal.SIGINT)
    print("went on", flush=True)

train_tokenizer([sys.argv[1]], Path(sys.argv[2]), 300, tell=stop)
print("made")
"""


@pytest.mark.parametrize(
    ("handler", "code", "out", "files"),
    [("default", -signal.SIGINT, [], 0), ("mine", 0, ["heard", "made", "went on"], 2)],
)
def test_ctrl_c_stops_it_in_the_middle_of_the_library(
    tmp_path: Path, handler: str, code: int, out: list[str], files: int
) -> None:
    """Which would go on for minutes; only where the caller hears Ctrl-C in its own way, it is left to that."""
    command = [sys.executable, "-c", STOPPED, str(REVIEWS), str(tmp_path / "made"), handler]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert (done.returncode, sorted(done.stdout.splitlines())) == (code, out), done.stderr
    assert len(list((tmp_path / "made").iterdir())) == files
