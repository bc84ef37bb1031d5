"""Fast tokenisers, trusted as far as they are proven: whatever they are, the ids are those of `tokenizers`.

                       ┌ its code points were compared, and are alike ─ fast
document ─ does it hold┤
                       └ one that ever differed ─────────────────────── reference
Besides, nasty texts once a tokenizer and the head of every piece: a difference there, and the fast one is out.
"""

import importlib.metadata
import io
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phased_cpt.data.chunks import Integers
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.errors import InputError
from phased_cpt.run_dir import publish_file

CODE_POINTS = 0x110000
# Enough to see what is wrong everywhere. The reference takes 3 ms for a head; of small files not each has one.
HEAD_CHARACTERS, HEAD_EVERY = 16 * 2**10, 4 * 2**20

# Where a code point stands decides what it becomes: alone, among letters, digits, blanks, quotes, marks, twice. Each is
# a text of its own: all in one, they hid ten digits of the Llama 3 pattern that another library gets wrong.
CONTEXTS = (
    *("{0}", "a{0}b", "1{0}2", " {0} ", '"{0}"', "-{0}\u0301{0}", "\n{0}\n", "x {0}{0}y"),
    *("y\u0301\u0302{0}\r\n", "{0}{0}{0}"),
)

NASTY = (
    *("", " ", "\n", "\t", "\r\n", "\r", "\0", "  \n \n\n  x", "a\r\nb\rc\n", " leading", "trailing ", "\u00a0\u3000x"),
    *("don't we'll I'M they'Re", "x" * 5000, " " * 3000, "\n" * 3000, "ab" * 3000, "1234567890" * 300, "=-" * 500),
    *(
        "e\u0301 \u00e9",
        "\u1100\u1161\u11a8 \uac01",
        "\ufb01 \u2126 \u00c5",
        "\u0301\u0302x\u0302\u0301",
        "\u07f3\u07fd",
    ),
    *(
        "日本語の文章です。これは試験です。",
        "中文沒有空格的句子，繁體與简体",
        "한국어 문장입니다",
        "สวัสดีชาวโลก",
        "नमस्ते दुनिया",
        "مرحبا بالعالم",
    ),
    *("👩‍👩‍👧‍👦🏳️‍🌈🇩🇪", "\ufeffx", "\u200b\u200d\u2028\u2029\x85", "\ufffd\uffff\U0010ffff", "naïve Å ﬁ ½ ² Ǆ ß İ ı"),
    "def f(x):\n\tif x:\n\t\treturn [i for i in range(10)]  # ok\n\n\n    pass\n",
)

Ids = NDArray[Any]  # of whole numbers; what a library gives is uint32
Fast = Callable[[list[str], bool], "Encoded"]


class Encoded(NamedTuple):
    """The ids of some texts, one behind the other, and how many each has."""

    ids: Ids
    lengths: Integers


class Differs(Exception):  # noqa: N818
    """A fast backend gave other ids than the reference, where it should not."""


def by_reference(tokenizer: Tokenizer, texts: Sequence[str], special: bool) -> Encoded:
    """What every id is measured by."""
    tokenizer.reference.encode_special_tokens = not special
    try:
        encodings = tokenizer.reference.encode_batch_fast(list(texts), add_special_tokens=False)
    except Exception as error:  # it raises nothing more special: an unknown token that the vocabulary does not have
        raise InputError(f"{tokenizer.name}: this tokenizer cannot tokenise these texts: {error}") from None
    lengths = np.array([len(encoding) for encoding in encodings], np.int64)
    ids = np.fromiter(itertools.chain.from_iterable(e.ids for e in encodings), np.uint32, int(lengths.sum()))
    return Encoded(ids, lengths)


# The fast ones -------------------------------------------------------------------------------------------------------


def _fastokens(tokenizer: Tokenizer) -> Fast:
    import fastokens

    native = fastokens.Tokenizer.from_json_str(tokenizer.json)

    def encode(texts: list[str], special: bool) -> Encoded:
        ids, offsets = native.encode_batch_flat(texts, split_special_tokens=not special)
        return Encoded(np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64)).astype(np.int64))

    return encode


def _gigatoken(tokenizer: Tokenizer) -> Fast:
    """It always reads special tokens as such, so plain texts go through one that was never told of them."""
    import gigatoken

    told = json.loads(tokenizer.json)
    untold = told | {"added_tokens": [token for token in told["added_tokens"] if not token["special"]]}
    natives = [gigatoken.Tokenizer.from_json(json.dumps(each)) for each in (untold, told)]

    def encode(texts: list[str], special: bool) -> Encoded:
        layout = natives[special].encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return Encoded(np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets))

    return encode


BACKENDS: dict[str, Callable[[Tokenizer], Fast]] = {"fastokens": _fastokens, "gigatoken": _gigatoken}
DEFAULT = "fastokens"  # docs/decisions/0009: as fast as the other, and alike on every code point


# The proof -----------------------------------------------------------------------------------------------------------


@dataclass
class Proof:
    """What is known of a backend with a tokenizer: which code points were compared, and which of them differ."""

    compared: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(CODE_POINTS, bool))
    unsafe: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(CODE_POINTS, bool))
    nasty: bool = False  # the nasty texts were alike
    refused: str = ""  # why this backend is not used with this tokenizer

    def add(self, other: "Proof") -> None:
        """What another process has found out."""
        self.compared |= other.compared
        self.unsafe |= other.unsafe
        self.nasty |= other.nasty
        self.refused = self.refused or other.refused

    def save(self, file: Path) -> None:
        content = io.BytesIO()
        np.savez_compressed(
            content,
            compared=np.packbits(self.compared),
            unsafe=np.packbits(self.unsafe),
            nasty=np.array(self.nasty),
            refused=np.array(self.refused),
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        publish_file(file, content.getvalue(), shared=True)

    @classmethod
    def read(cls, file: Path) -> "Proof":
        try:
            with np.load(file, allow_pickle=False) as kept:
                bits = [np.unpackbits(kept[name]).astype(bool) for name in ("compared", "unsafe")]
                assert {len(each) for each in bits} == {CODE_POINTS}
                return cls(bits[0], bits[1], bool(kept["nasty"]), str(kept["refused"]))
        except Exception:  # absent, torn or of another time: then nothing is proven yet
            return cls()


def proof_file(cache: Path, backend: str, tokenizer: Tokenizer) -> Path:
    """Of these versions: another release is another program."""
    versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in (backend, "tokenizers"))
    return cache / "proofs" / f"{tokenizer.digest[:32]}-{versions}.npz"


class Backend:
    """Texts to ids: by a fast library where it is proven, else by the reference."""

    def __init__(self, tokenizer: Tokenizer, name: str, proof: Proof) -> None:
        self.tokenizer, self.name, self.proof = tokenizer, name, proof
        self.slow_documents = 0
        self._since_a_head = HEAD_EVERY
        self._fast = None if name == "tokenizers" else BACKENDS[name](tokenizer)

    def encode(self, texts: Sequence[str], special: bool = False) -> Encoded:
        """The ids of the texts, in order; the documents that took the slow road are counted."""
        if self._is_slow(special):
            self.slow_documents += len(texts) * (self._fast is not None)
            return by_reference(self.tokenizer, texts, special)
        assert self._fast is not None
        unsafe = self._unsafe(texts)
        if not unsafe:
            return self._fast(list(texts), special)
        self.slow_documents += len(unsafe)
        slow = by_reference(self.tokenizer, [texts[at] for at in unsafe], special)
        safe = sorted(set(range(len(texts))) - set(unsafe))
        fast = self._fast([texts[at] for at in safe], special)
        return interleaved(len(texts), [(safe, fast), (unsafe, slow)])

    def prove_head(self, texts: Sequence[str], special: bool = False) -> None:
        """The first texts of every few megabytes, and once a tokenizer the nasty ones, must be alike."""
        if self._is_slow(special):
            return
        if self._since_a_head >= HEAD_EVERY:
            self._require_alike(list(_head(texts)), special)
            self._since_a_head = 0
        self._since_a_head += sum(map(len, texts))
        if not self.proof.nasty:
            added = [f"a{token}b {token}  {token}\n{token}{token}" for token in self.tokenizer.added]
            for as_token in (False, True):
                if not self._is_slow(as_token):
                    self._require_alike([*NASTY, *added], as_token)
            self.proof.nasty = True

    def _is_slow(self, special: bool) -> bool:
        return self._fast is None or (special and self.tokenizer.odd_parsed is not None)

    def _require_alike(self, texts: list[str], special: bool) -> None:
        assert self._fast is not None
        differing = [texts[at] for at in self._differing(texts, special)]
        unsafe = set(self._unsafe(differing)) if differing else set()
        if unexplained := [text for at, text in enumerate(differing) if at not in unsafe]:
            raise Differs(f"other ids than `tokenizers` for {unexplained[0][:60]!r}")

    def _unsafe(self, texts: Sequence[str]) -> list[int]:
        """Which texts hold a code point that ever differed; those seen for the first time are compared first."""
        if not self.proof.compared[:128].all():
            self._compare(np.arange(128))
        if self.proof.unsafe[:128].any():
            return list(range(len(texts)))
        wide = [at for at, text in enumerate(texts) if not text.isascii()]
        points = np.frombuffer("".join(texts[at] for at in wide).encode("utf-32-le"), np.uint32)
        self._compare(points[~self.proof.compared[points]])
        unsafe = self.proof.unsafe[points]
        if not unsafe.any():
            return []
        ends = np.cumsum([len(texts[at]) for at in wide])
        hits = np.searchsorted(ends, np.flatnonzero(unsafe), side="right")
        return [wide[at] for at in np.unique(hits)]

    def _compare(self, points: NDArray[Any]) -> None:
        new = np.unique(points)
        if len(new):
            texts = [context.format(chr(point)) for point in new.tolist() for context in CONTEXTS]
            differing = np.array(self._differing(texts, special=False), np.int64)
            self.proof.unsafe[new[differing // len(CONTEXTS)]] = True
            self.proof.compared[new] = True

    def _differing(self, texts: list[str], special: bool) -> list[int]:
        assert self._fast is not None
        fast, reference = self._fast(texts, special), by_reference(self.tokenizer, texts, special)
        if np.array_equal(fast.lengths, reference.lengths) and np.array_equal(fast.ids, reference.ids):
            return []
        pairs = zip(_each(fast), _each(reference), strict=True)
        return [at for at, (one, other) in enumerate(pairs) if not np.array_equal(one, other)]


def _head(texts: Iterable[str]) -> Iterable[str]:
    """The first few kilobytes; of a longer text its beginning."""
    left = HEAD_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _each(encoded: Encoded) -> list[Ids]:
    return np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]) if len(encoded.lengths) else []


def interleaved(count: int, parts: Sequence[tuple[list[int], Encoded]]) -> Encoded:
    """Several encodings of some of the texts, put back in the texts' order."""
    parts = [part for part in parts if part[0]]
    if len(parts) == 1:
        return parts[0][1]
    each: list[Any] = [np.empty(0, np.uint32)] * count
    for places, encoded in parts:
        for at, ids in zip(places, _each(encoded), strict=True):
            each[at] = ids
    lengths = np.array([len(ids) for ids in each], np.int64)
    return Encoded(np.concatenate([np.empty(0, np.uint32), *each]), lengths)


# Which one is used ---------------------------------------------------------------------------------------------------


class Backends:
    """The backends of a tokenizer, each loaded once, when something is tokenised with it."""

    def __init__(self, tokenizer: Tokenizer, cache: Path, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._cache, self._tell = tokenizer, cache, tell
        self._loaded: dict[str, Backend] = {}

    def named(self, wanted: str) -> Backend:
        """The one that is wanted, or the reference, saying why."""
        name = DEFAULT if wanted == "auto" else wanted
        if name not in self._loaded:
            self._loaded[name] = self._load(name, wanted)
        return self._loaded[name]

    def refuse(self, backend: Backend, why: str) -> Backend:
        """It gave other ids: never again with this tokenizer, in these versions."""
        backend.proof.refused = why
        self.keep(backend)
        self._loaded[backend.name] = self._reference(backend.name, why)
        return self._loaded[backend.name]

    def keep(self, backend: Backend) -> None:
        """Remember what was proven."""
        if backend.name != "tokenizers":
            backend.proof.save(proof_file(self._cache, backend.name, self._tokenizer))

    def _load(self, name: str, wanted: str) -> Backend:
        try:
            proof = Proof() if name == "tokenizers" else Proof.read(proof_file(self._cache, name, self._tokenizer))
        except importlib.metadata.PackageNotFoundError:
            if wanted == "auto":
                return self._reference(name, "it is not installed")
            reason = f"{name} is not installed; pip install {name}, or take auto"
            raise InputError(f"data.tokenizer_backend: {reason}") from None
        if proof.refused:
            return self._reference(name, proof.refused)
        if self._tokenizer.odd_plain and name != "tokenizers":
            return self._reference(name, f"its token {self._tokenizer.odd_plain!r} depends on what stands beside it")
        try:
            return Backend(self._tokenizer, name, proof)
        except Exception as error:  # whatever a library says that does not know this kind of tokenizer
            return self._reference(name, f"it cannot load this tokenizer ({error})")

    def _reference(self, name: str, why: str) -> Backend:
        self._tell(f"tokenising with `tokenizers`, which is slow, and not with {name}: {why}")
        return Backend(self._tokenizer, "tokenizers", Proof())
