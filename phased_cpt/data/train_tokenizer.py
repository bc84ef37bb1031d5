"""A tokenizer of one's own: byte-level BPE, trained on the documents of sources, that gives any text back as it was.

sources ─ documents ─ words ─ counted ─ merged, the most frequent pair first ─ tokenizer.json, tokenizer_config.json
"""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer

from phased_cpt.config.schema import Data
from phased_cpt.data.backends import by_reference
from phased_cpt.data.cache import Facts, Tell
from phased_cpt.data.documents import Reading, read_documents
from phased_cpt.data.emit import new_folder
from phased_cpt.data.files import find_files, pieces_of
from phased_cpt.data.piecework import Result, Source
from phased_cpt.data.render import Rendering
from phased_cpt.data.tokenizer import HUB_FILES, Tokenizer, load_tokenizer
from phased_cpt.data.tokens import LineNumbers, told_problems
from phased_cpt.errors import InputError
from phased_cpt.run_dir import publish_file

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")  # the ids 0 to 3
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Words of code, as Qwen2 has them, so that the fast libraries and llama.cpp know the pattern: digits one by one, blanks
# of an indentation together (the last one goes with its word), newlines together with the blanks before them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FEWEST = 256 + len(SPECIAL)
MOST = 2**20  # the library reserves memory for as many as are asked for; the largest in use have a quarter of that
COUNTABLE = 2**31 - 1  # the library counts pairs in 32 bits: beyond, it lost the most frequent one and did not say so
TWICE = 2  # how often a pair must occur to become an entry: of one that occurs once, a model learns nothing
LONGEST_TEXT = 2**16  # characters that the library is given at once: it holds 256 texts
MEASURED = 4 * 2**20  # characters in which the tokens are counted at the end
TELL_SECONDS = 10.0


def train_tokenizer(
    sources: Sequence[str], output: Path, vocabulary: int, *, text_field: str = "auto", tell: Tell
) -> Facts:
    """Train on every document of the sources, and write what transformers and `prepare` read into a new folder."""
    started = time.monotonic()
    _require_sensible(vocabulary)
    _require_free(output := output.expanduser())
    if not sources:
        raise InputError("no source is named; name the files, folders or globs of the texts")
    corpus = _Corpus([_source(path, text_field, tell) for path in sources], tell)
    folder = new_folder("--output", output)
    with _stopped_at_once():
        made = trained(corpus.texts(), vocabulary, words_of_code())
    entries = made.get_vocab_size(with_added_tokens=True)
    if entries < vocabulary:
        tell(f"{entries:,} entries, and not {vocabulary:,}: no pair is left that occurs twice; more text gives more")
    _publish(folder, files_of(made))
    return {
        "output": str(folder),
        "documents": corpus.documents,
        "bytes": corpus.bytes,
        "vocabulary": entries,
        "bytes_per_token": _bytes_per_token(folder, corpus.sample.texts),
        "seconds": time.monotonic() - started,
    }


def _require_sensible(vocabulary: int) -> None:
    if not FEWEST <= vocabulary <= MOST:
        allowed = f"{FEWEST} (every byte, and {len(SPECIAL)} special tokens) to {MOST}"
        raise InputError(f"--vocabulary {vocabulary}: allowed: {allowed}; for a small model: --vocabulary 4096")


def _require_free(folder: Path) -> None:
    """Whatever decides how the folder is loaded would be lost, or mixed with what is made now."""
    patterns = [pattern for pattern in HUB_FILES if pattern != "config.json"]
    if found := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
        raise InputError(f"--output {folder}: it holds a tokenizer already ({found[0]}); name another folder")


# The tokenizer -------------------------------------------------------------------------------------------------------


def trained(texts: Iterable[str], vocabulary: int, words: PreTokenizer) -> Reference:
    """The same for the same texts on any number of cores: counts are sums, and of equal pairs the first one wins."""
    made = Reference(models.BPE())
    made.pre_tokenizer = words
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=TWICE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def words_of_code() -> PreTokenizer:
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    return pre_tokenizers.Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


def words_of_gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False)


def files_of(tokenizer: Reference, **settings: object) -> dict[str, bytes]:
    """What a folder holds from which it can be loaded; tokenizer.json last, as without it there is no tokenizer."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[3],
        **settings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    return {
        "tokenizer_config.json": f"{json.dumps(config, indent=2)}\n".encode(),
        "tokenizer.json": f"{tokenizer.to_str(pretty=True)}\n".encode(),
    }


def _publish(folder: Path, files: dict[str, bytes]) -> None:
    _require_free(folder)  # training takes its time, and somebody else may have been here
    for name, content in files.items():
        publish_file(folder / name, content)


def _bytes_per_token(folder: Path, texts: Sequence[str]) -> float:
    tokenizer = load_tokenizer(str(folder), None, None, folder)
    tokens = sum(int(by_reference(tokenizer, [text], special=False).lengths.sum()) for text in texts)
    return sum(len(text.encode()) for text in texts) / tokens


@contextlib.contextmanager
def _stopped_at_once() -> Iterator[None]:
    """Ctrl-C ends the process here and now: the library would look up minutes later, and nothing is written yet."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # somebody has other plans with it, or it is not ours to set
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# What it is trained on -----------------------------------------------------------------------------------------------

# Documents are rendered for a tokenizer, and there is none yet. This one's template prints what was said and nothing
# else: the words of a chat template are special tokens, which no training need find.
NOBODY = Tokenizer(
    name="the tokenizer that is trained",
    json="",
    eos="",
    eos_id=0,
    pad_id=0,
    prefix=(),
    vocabulary=0,
    specials=(),
    added=(),
    odd_plain=None,
    odd_parsed=None,
    chat_template="{% for message in messages %}{{ message['content'] or '' }}\n{% endfor %}",
    template_tokens=(),
)


def _source(path: str, text_field: str, tell: Tell) -> Source:
    files = find_files(path, tell)
    if tokens := [file.path for file in files if file.format == "tokens"]:
        raise InputError(f"{tokens[0]}: tokens of another tokenizer; name the texts that they were made of")
    rendering = Rendering(text_field, {}, parse_special_tokens=False)
    return Source(path, files, rendering, Data().max_line_bytes, skip_bad=False, max_bad_share=0)


@dataclass
class _Sample:
    """Every n-th text of a corpus, as many as can be kept; of a small one all."""

    texts: list[str] = field(default_factory=list)
    _seen: int = 0
    _every: int = 1
    _characters: int = 0

    def add(self, text: str) -> None:
        if self._seen % self._every == 0:
            self.texts.append(text)
            self._characters += len(text)
        self._seen += 1
        if self._characters > MEASURED:
            self.texts, self._every = self.texts[::2], 2 * self._every
            self._characters = sum(map(len, self.texts))


class _Corpus:
    """The documents of the sources, one behind the other, and how much was read of them."""

    def __init__(self, sources: Sequence[Source], tell: Tell) -> None:
        self.documents, self.bytes, self.sample = 0, 0, _Sample()
        self._sources, self._tell, self._told = sources, tell, time.monotonic()

    def texts(self) -> Iterator[str]:
        """Each document in parts of a size that can be held."""
        for source in self._sources:
            for document in _documents(source):
                self.documents += 1
                for text in _parts(document):
                    self._count(text)
                    yield text
                self._tell_now_and_then()
        self._tell(f"{self._read()}; now the most frequent pairs are merged")

    def _count(self, text: str) -> None:
        self.bytes += len(text.encode())
        if self.bytes > COUNTABLE:
            what = f"more than {COUNTABLE / 1e9:.1f} GB of text, which cannot be counted"
            raise InputError(f"{what}; name a part of it: a few hundred MB teach the same entries")
        self.sample.add(text)

    def _tell_now_and_then(self) -> None:
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            self._tell(self._read())

    def _read(self) -> str:
        return f"{self.documents:,} document{'s' * (self.documents != 1)}, {self.bytes / 1e6:,.1f} MB are read"


def _documents(source: Source) -> Iterator[str]:
    """As `prepare` reads them; all that is bad in a source is told at its end, and then nothing is trained."""
    total, numbers, none = Reading(), LineNumbers(source), np.empty(0, np.int64)
    for piece in pieces_of(source.files, source.max_line_bytes):
        reading = Reading()
        for found in read_documents(source.files, piece, source.rendering, source.max_line_bytes, NOBODY, reading):
            yield "".join(part.text for part in found.document.parts)
        numbers.add(Result(piece, none, none, b"", reading, 0, None), total)
    numbers.close(total)
    if total.bad:
        raise _bad_records(source, total, told_problems(source, numbers.problems))
    if not total.documents:
        raise InputError(f"{source.name}: no document to train on; all its texts are empty")


def _bad_records(source: Source, total: Reading, problems: Sequence[str]) -> InputError:
    more = [f"… and {total.bad - len(problems)} more"] if total.bad > len(problems) else []
    count = f"{total.bad} bad record{'s' * (total.bad != 1)} in {source.name}, and {total.documents:,} good"
    return InputError("\n".join([*problems, *more, f"{count}; mend them, or take them out"]))


def _parts(document: str) -> Iterator[str]:
    """A long document, cut at ends of lines: hardly a word goes over one, and those that do are cut there alike."""
    start = 0
    while len(document) - start > LONGEST_TEXT:
        end = document.rfind("\n", start, start + LONGEST_TEXT) + 1 or start + LONGEST_TEXT
        yield document[start:end]
        start = end
    yield document[start:]
