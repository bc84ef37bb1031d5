"""Whatever tokenises, the ids are those of `tokenizers`; a backend that differs is found out."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex
from tokenizers import Tokenizer as Reference
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from phased_cpt.data import backends
from phased_cpt.data.backends import BACKENDS, CONTEXTS, Encoded, Fast, Proof
from phased_cpt.data.prepared import PreparedRun
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.errors import InputError
from tests.conftest import SAMPLE, TOKENIZER, Write
from tests.data.conftest import Prepare, lines

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRICKY = [
    *(
        "plain ascii",
        "naïve café",
        "日本語 한국어 中文",
        "👩‍👩‍👧 🇩🇪",
        "\u07f3\u07fd \u07fd\u07f3",
        "e\u0301\u0323 \u0323\u0301e",
    ),
    *('("W", "\ua7cf")', '"\U00016ebb"', "\x85 \u2028\u00a0\u3000x", "ﬁ ½ Ǆ İ ß", "x" * 3000, " \t\n\r\n  " * 50 + "x"),
    *("<|endoftext|> <|im_start|>user", "\0\x01\x7f", "\ufeffbom", "मन्त्र สวัสดี مرحبا", "a\r\nb\rc"),
]


def ids(run: PreparedRun) -> list[int]:
    return [each for phase in run.phases for each in phase.train.stores[0].ids.tolist()]


def reference_ids(run: PreparedRun, documents: list[str]) -> list[int]:
    reference = Reference.from_file(run.tokenizer.name)
    reference.encode_special_tokens = True
    return [each for text in documents for each in [*reference.encode(text, add_special_tokens=False).ids, 0]]


@pytest.fixture
def qwen(write: Write) -> Path:
    """The sample's vocabulary under the pattern and the normalizer of Qwen2."""
    reference = Reference.from_file(str(TOKENIZER))
    reference.normalizer = NFC()
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = Sequence([Split(Regex(QWEN), "isolated", invert=False), byte_level])
    write(reference.to_str(), "qwen/tokenizer.json")
    return write((SAMPLE / "tokenizer_config.json").read_bytes(), "qwen/tokenizer_config.json").parent


@pytest.mark.parametrize("backend", ["auto", "fastokens", "gigatoken", "tokenizers"])
@pytest.mark.parametrize("pattern", ["gpt2", "qwen"])
def test_the_whole_sample_and_what_is_tricky_get_the_ids_of_the_reference(
    prepared: Prepare, write: Write, qwen: Path, backend: str, pattern: str
) -> None:
    records = [json.loads(line) for file in sorted(SAMPLE.glob("*.jsonl")) for line in file.read_text().splitlines()]
    documents = [record["training_content"] for record in records] + TRICKY
    write(lines(*({"text": text} for text in documents)), "a.jsonl")
    name = str(TOKENIZER if pattern == "gpt2" else qwen / "tokenizer.json")
    run = prepared("a.jsonl", set_=(f"model.tokenizer={name}",), workers=2, tokenizer_backend=backend)
    assert ids(run) == reference_ids(run, documents)
    facts = run.phases[0].train.stores[0].facts
    assert facts["backend"] == ("fastokens" if backend == "auto" else backend), "and not because it fell back"


def liar(differs: Callable[[str], bool]) -> Callable[[Tokenizer], Fast]:
    """A backend that gives one more id for some texts."""

    def load(tokenizer: Tokenizer) -> Fast:
        def encode(texts: list[str], special: bool) -> Encoded:
            honest = backends.by_reference(tokenizer, texts, special)
            each = np.split(honest.ids, np.cumsum(honest.lengths)[:-1])
            told = [np.append(ids, 7) if differs(text) else ids for ids, text in zip(each, texts, strict=True)]
            return Encoded(np.concatenate(told).astype(np.uint32), np.array([len(ids) for ids in told]))

        return encode

    return load


DOCUMENTS = ["good é", "good ü", "plain", "é again", "also plain"]


def test_a_code_point_that_differs_takes_its_documents_to_the_reference(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "fastokens", liar(lambda text: text.count("é") and not text.startswith("don't")))
    monkeypatch.setattr(backends, "NASTY", ("harmless",))
    write(lines(*({"text": text} for text in DOCUMENTS)), "a.jsonl")
    run = prepared("a.jsonl")
    facts = run.phases[0].train.stores[0].facts
    assert ids(run) == reference_ids(run, DOCUMENTS)
    assert (facts["backend"], facts["slow_documents"]) == ("fastokens", 2)
    (file,) = Path("outputs/cache/proofs").iterdir()
    proof = Proof.read(file)
    assert [chr(point) for point in np.flatnonzero(proof.unsafe)] == ["é"]
    assert proof.compared[ord("ü")]
    assert not proof.compared[ord("ö")], "only what occurs is compared"


@pytest.mark.parametrize(
    "lie",
    ["good é", "a\r\nb\rc\n", "a<|im_end|>b <|im_end|>  <|im_end|>\n<|im_end|><|im_end|>"],
    ids=["head", "nasty", "special"],
)
def test_a_difference_where_none_should_be_falls_back_whole_and_says_so(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lie: str
) -> None:
    monkeypatch.setitem(BACKENDS, "fastokens", liar(lambda text: text == lie))
    write(lines(*({"text": text} for text in DOCUMENTS)), "a.jsonl")
    write(lines(*({"text": text} for text in DOCUMENTS[1:])), "b.jsonl")
    run = prepared("a.jsonl", "b.jsonl")
    assert ids(run) == reference_ids(run, DOCUMENTS + DOCUMENTS[1:])
    assert [phase.train.stores[0].facts["backend"] for phase in run.phases] == ["tokenizers"] * 2
    told = capsys.readouterr().err
    assert f"not with fastokens: other ids than `tokenizers` for {lie[:60]!r}" in told
    assert told.count("tokenising with `tokenizers`") == 1, "it is told once"
    monkeypatch.setitem(BACKENDS, "fastokens", liar(lambda _: True))
    write(lines({"text": "more"}), "c.jsonl")
    assert ids(prepared("c.jsonl")) == reference_ids(run, ["more"]), "and remembered: it is not asked again"


def test_a_difference_that_is_explained_excuses_no_other(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "fastokens", liar(lambda text: "é" in text or text == "plain wrong"))
    monkeypatch.setattr(backends, "NASTY", ("harmless",))
    documents = ["é first", "plain wrong", "plain right"]
    write(lines(*({"text": text} for text in documents)), "a.jsonl")
    run = prepared("a.jsonl", eval_share=0)
    assert ids(run) == reference_ids(run, documents)
    assert run.phases[0].train.stores[0].facts["backend"] == "tokenizers"


def test_both_readings_of_special_tokens_are_proven(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(tokenizer: Tokenizer) -> Fast:
        plain, parsed = liar(lambda _: False)(tokenizer), liar(lambda text: text == "a\r\nb\rc\n")(tokenizer)
        return lambda texts, special: (parsed if special else plain)(texts, special)

    monkeypatch.setitem(BACKENDS, "fastokens", load)
    write(lines(*({"text": text} for text in DOCUMENTS)), "a.jsonl")
    assert prepared("a.jsonl").phases[0].train.stores[0].facts["backend"] == "tokenizers"


def test_an_honest_backend_is_not_found_out(prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the two above."""
    monkeypatch.setitem(BACKENDS, "fastokens", liar(lambda _: False))
    write(lines(*({"text": text} for text in DOCUMENTS)), "a.jsonl")
    facts = prepared("a.jsonl").phases[0].train.stores[0].facts
    assert (facts["backend"], facts["slow_documents"]) == ("fastokens", 0)


def test_a_backend_that_cannot_load_the_tokenizer_gives_way(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Tokenizer) -> Fast:
        raise ValueError("unknown model type Unigram")

    monkeypatch.setitem(BACKENDS, "fastokens", refuse)
    write(lines({"text": "x"}), "a.jsonl")
    assert prepared("a.jsonl").phases[0].train.stores[0].facts["backend"] == "tokenizers"
    assert "not with fastokens: it cannot load this tokenizer (unknown model type Unigram)" in capsys.readouterr().err


def test_a_backend_that_is_not_installed_is_asked_for_by_name(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = backends.importlib.metadata.version

    def version(name: str) -> str:
        if name == "gigatoken":
            raise backends.importlib.metadata.PackageNotFoundError
        return real(name)

    monkeypatch.setattr(backends.importlib.metadata, "version", version)
    write(lines({"text": "x"}), "a.jsonl")
    with pytest.raises(InputError, match="gigatoken is not installed; pip install gigatoken, or take auto"):
        prepared("a.jsonl", tokenizer_backend="gigatoken")
    monkeypatch.setattr(backends, "DEFAULT", "gigatoken")
    assert prepared("a.jsonl").phases[0].train.stores[0].facts["backend"] == "tokenizers"


def test_the_backends_are_the_choices_of_the_configuration() -> None:
    from phased_cpt.config.schema import Data

    choices = Data.model_fields["tokenizer_backend"].annotation.__args__  # type: ignore[union-attr]
    assert set(choices) == {"auto", "tokenizers", *BACKENDS}


def test_a_code_point_is_compared_in_every_place_that_matters() -> None:
    texts = [context.format("é") for context in CONTEXTS]
    for alone in ("é", "aéb", "1é2", " é ", '"é"', "-é\u0301é", "\né\n"):
        assert alone in texts
    for neighbours in ("éé", "\u0302é", "é\r\n"):
        assert any(neighbours in text for text in texts)


def test_a_torn_proof_is_no_proof(tmp_path: Path) -> None:
    proof = Proof()
    proof.compared[5] = proof.nasty = True
    proof.save(tmp_path / "p.npz")
    assert Proof.read(tmp_path / "p.npz").compared[5]
    (tmp_path / "p.npz").write_bytes((tmp_path / "p.npz").read_bytes()[:-30])
    assert not Proof.read(tmp_path / "p.npz").compared.any()
