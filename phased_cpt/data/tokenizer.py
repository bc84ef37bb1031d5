"""The tokenizer of a run, read from its own files without transformers (whose import costs seconds).

tokenizer.json         how text becomes ids
tokenizer_config.json  which token ends a document, which one begins it, how a chat is written
"""

import functools
import hashlib
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Reference

from phased_cpt import children
from phased_cpt.data.files import is_hub_id
from phased_cpt.errors import InputError

HUB_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "config.json",
]


@dataclass(frozen=True)
class Tokenizer:
    """What the data pipeline needs to know of a tokenizer; ids are those of the `tokenizers` library."""

    name: str
    json: str  # tokenizer.json, without truncation and padding
    eos: str
    eos_id: int
    pad_id: int
    prefix: tuple[int, ...]  # what the tokenizer puts before every text: a BOS, or nothing
    vocabulary: int  # the largest id + 1
    specials: tuple[str, ...]  # texts of the special tokens
    added: tuple[str, ...]  # these and the others that were added to the vocabulary
    # One of them that is found or not by what stands beside it (fast libraries get these wrong), in plain texts and in
    # texts whose special tokens are read as such.
    odd_plain: str | None
    odd_parsed: str | None
    chat_template: str | None
    template_tokens: tuple[tuple[str, str], ...]  # bos_token, eos_token, … as a template may ask for them

    @functools.cached_property
    def digest(self) -> str:
        """Of all that decides the ids of a text."""
        parts = [self.json, self.eos_id, self.prefix, self.chat_template, self.template_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @functools.cached_property
    def reference(self) -> Reference:
        return Reference.from_str(self.json)

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocabulary <= 2**16 else "uint32"

    def files(self) -> dict[str, bytes]:
        """A folder of this tokenizer that transformers reads to the same ids."""
        named = {key: text for key, text in self.template_tokens if text in self.added}
        pad = next((token for token in self.added if self.reference.token_to_id(token) == self.pad_id), self.eos)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "eos_token": self.eos, "pad_token": pad}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        written = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        return {"tokenizer.json": self.json.encode(), "tokenizer_config.json": written.encode()}

    def special_in(self, text: str) -> bool:
        """Whether the text of a special token occurs; their first letters are looked for before the pattern is."""
        starts, pattern = _special_pattern(self.specials)
        return any(start in text for start in starts) and pattern.search(text) is not None

    def quoted(self, text: str, before: str, behind: str) -> str:
        """The text with marks around every special token in it."""
        if not self.special_in(text):
            return text
        return _special_pattern(self.specials)[1].sub(lambda found: f"{before}{found[0]}{behind}", text)


def load_tokenizer(name: str, revision: str | None, eos: str | None, cache: Path) -> Tokenizer:
    """From a tokenizer.json, a folder or a hub id."""
    file = _find(name, revision, cache)
    settings = _settings(file.parent)
    try:
        reference = Reference.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise InputError(f"{file}: not a tokenizer.json that can be read: {error}") from None
    reference.no_truncation()
    reference.no_padding()
    if getattr(reference.model, "dropout", None):
        reference.model.dropout = None  # else the ids of a text are another throw of the dice each time
    added = list(reference.get_added_tokens_decoder().values())
    specials = tuple(sorted(token.content for token in added if token.special))
    eos = eos or _text(settings.get("eos_token"))
    eos_id = _eos_id(name, reference, eos, specials)
    pad = _text(settings.get("pad_token"))
    pad_id = reference.token_to_id(pad) if pad else None
    extra = settings.get("extra_special_tokens")
    named = {key: _text(value) for key, value in (settings | (extra if isinstance(extra, dict) else {})).items()}
    named = {key: text for key, text in named.items() if key.endswith("_token")}
    return Tokenizer(
        name=name,
        json=reference.to_str(),
        eos=eos or "",
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        prefix=_prefix(reference),
        vocabulary=max(reference.get_vocab(with_added_tokens=True).values()) + 1,
        specials=specials,
        added=tuple(sorted(token.content for token in added)),
        odd_plain=_odd([token for token in added if not token.special]),
        odd_parsed=_odd(added),
        chat_template=_chat_template(file.parent, settings),
        template_tokens=tuple(sorted((key, text) for key, text in named.items() if text)),
    )


def _odd(added: list[AddedToken]) -> str | None:
    for token in added:
        if token.lstrip or token.rstrip or token.single_word or token.normalized != added[0].normalized:
            return str(token.content)
    return None


def _eos_id(name: str, reference: Reference, eos: str | None, specials: tuple[str, ...]) -> int:
    known = ", ".join(specials[:8]) or "it has no special tokens at all"
    if eos is None:
        raise InputError(
            f"{name}: this tokenizer does not say which token ends a document (eos_token in tokenizer_config.json); "
            f"set model.eos_token to one of: {known}"
        )
    eos_id = reference.token_to_id(eos)
    if eos_id is None:
        raise InputError(
            f"{name}: {eos!r} is to end a document, and is not in this tokenizer; model.eos_token: {known}"
        )
    return int(eos_id)


def _prefix(reference: Reference) -> tuple[int, ...]:
    """What stands before every text; what stands behind it (an EOS, a [SEP]) is ours to add, once a document.

    Only tokenizer.json says so: beside it, transformers does not look at add_bos_token either.
    """
    try:
        plain, full = (reference.encode("a", add_special_tokens=special).ids for special in (False, True))
    except Exception:  # it does not even know this letter, nor a token for what it does not know
        return ()
    return tuple(full[: next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)])


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        try:
            settings |= json.loads(file.read_bytes()) if file.exists() else {}
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{file}: not JSON that can be read: {error}") from None
    return settings


def _text(token: Any) -> str | None:
    """A token is written as its text, or as an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    try:
        if file.exists():
            return file.read_text(encoding="utf-8")
        given = settings.get("chat_template")
        if isinstance(given, list):
            given = {entry["name"]: entry["template"] for entry in given}.get("default")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: its chat template cannot be read: {error}") from None
    return given if isinstance(given, str) else None


@functools.cache
def _special_pattern(specials: tuple[str, ...]) -> tuple[tuple[str, ...], re.Pattern[str]]:
    starts = tuple(sorted({special[:2] for special in specials}))
    return starts, re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")


def vocabulary_of(model: dict[str, Any] | str | None) -> int | None:
    """The rows of a model's embedding, if its configuration lies here."""
    if isinstance(model, str):
        file = (
            Path(model).expanduser() if Path(model).expanduser().is_file() else Path(model).expanduser() / "config.json"
        )
        try:
            model = json.loads(file.read_bytes())
        except (OSError, ValueError):
            return None
    rows = model.get("vocab_size") if isinstance(model, dict) else None
    return rows if isinstance(rows, int) else None


# Where it lies -------------------------------------------------------------------------------------------------------


def _find(name: str, revision: str | None, cache: Path) -> Path:
    """The tokenizer.json; where a repository has none, one that transformers has written, in a child process."""
    place = Path(name).expanduser() if name.startswith(("~/", "/", ".")) else Path(name)
    if place.is_file():
        return place
    if place.exists() and not place.is_dir():
        raise InputError(f"{name}: neither a file nor a folder")
    if not place.is_dir():
        if not is_hub_id(name):
            raise InputError(f"{name}: no such tokenizer file or folder (looked from {Path.cwd()})")
        place = _from_hub(name, revision)
    file = place / "tokenizer.json"
    return file if file.exists() else _converted(name, place, cache)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # 0.2 s, so only where it is needed
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: no such file or folder, and not to be had from the hub: {reason}") from None


def _converted(name: str, folder: Path, cache: Path) -> Path:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".model", ".txt"))
    contents = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    made = cache / "tokenizers" / hashlib.sha256(repr(contents).encode()).hexdigest()[:32]
    if not (made / "tokenizer.json").exists():
        made.mkdir(parents=True, exist_ok=True)
        command = [*children.command("phased_cpt.data.convert"), str(folder), str(made)]
        # A pipe of its own: what transformers warns of is of no use unless it fails.
        child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})  # noqa: S603
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"{name}: it has no tokenizer.json, and transformers cannot make one: {reason}")
    return made / "tokenizer.json"
