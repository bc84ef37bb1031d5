"""A merged model on the disk: what it says of itself, what it may take the place of, and how it gets its name.

.merged_model.building/   plan, notes and model/, while it is made ─ model/ renamed ─→ merged_model/ with its merge.json
"""

import contextlib
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phased_cpt.data.cache import sha256_of
from phased_cpt.errors import InputError, RunIsBusy
from phased_cpt.ledger.fingerprint import digest_of
from phased_cpt.published import MERGED_MARKER
from phased_cpt.run_dir import sync_folder

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
OTHER_FILES = ("config.json", "generation_config.json", "README.md", "model.safetensors.index.json", MERGED_MARKER)
MAKING = re.compile(r"model|\.?(plan|choice|model.*)\.(json|done)(\.tmp)?")  # in the folder where it is made
SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What a merged model says of itself; None where there is none that says it."""
    try:
        facts = json.loads((folder / MERGED_MARKER).read_bytes())
        return facts if {"digest", "format", "files"} <= facts.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def is_whole(folder: Path, facts: dict[str, Any], *, thorough: bool = False) -> bool:
    """Every file, by its size; or by its bytes."""
    try:
        whole = all((folder / name).stat().st_size == each["bytes"] for name, each in facts["files"].items())
        hashed = [(folder / name, each["sha256"]) for name, each in facts["files"].items() if "sha256" in each]
        return whole and (not thorough or all(sha256_of(path) == digest for path, digest in hashed))
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def digest_beside(tokenizer: Path, base: Path) -> str:
    """Of the small files that are copied with the weights."""
    paths = [tokenizer / name for name in TOKENIZER_FILES] + [base / "config.json", base / "generation_config.json"]
    files = {path.name: sha256_of(path) for path in (*paths, *sorted(base.glob("*.py"))) if path.exists()}
    if broken := [path for path in paths if path.exists() and path.suffix == ".json" and not _is_json(path)]:
        raise InputError(f"{broken[0]}: damaged, this is no JSON; put it back")
    return digest_of(files)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


# What it takes the place of ----------------------------------------------------------------------------------------


def require_free(output: Path, sources: Sequence[Path]) -> None:
    """Nothing goes that a merge has not written, nor what is merged."""
    if os.path.lexists(output) and not output.is_dir():
        raise InputError(f"{output}: this is a file, and a merged model is a folder; name another")
    if others := sorted(path.name for path in output.iterdir() if not _is_own(path)) if output.is_dir() else []:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        what = f"holds {others[0]}{more}, which no merge has written"
        raise InputError(f"{output}: {what}; name another folder, or move it away")
    for source in sources:
        one, other = output.resolve(), source.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise InputError(f"{output}: lies within {source}, which is merged, or around it; name another folder")


def _is_own(path: Path) -> bool:
    """By its name in merge.json; where that is damaged, by the names that a merge gives."""
    facts = read_marker(path.parent)
    if facts is not None:
        return path.name in (*facts["files"], MERGED_MARKER)
    try:
        json.loads((path.parent / MERGED_MARKER).read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        named = path.name in (*TOKENIZER_FILES, *OTHER_FILES) or path.suffix == ".py"
        return named or SHARD.fullmatch(path.name) is not None
    return False  # of another program


# How it is made ----------------------------------------------------------------------------------------------------


def building_of(output: Path) -> Path:
    """Beside, so that it only has to be renamed."""
    return output.with_name(f".{output.name}.building")


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """One merge at a time into a folder; the kernel forgets one that has died."""
    building = building_of(output)
    try:
        building.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"{building}: no folder can be made here, because of a file; name another with --out"
        ) from None
    if others := [path.name for path in building.iterdir() if not MAKING.fullmatch(path.name)]:
        raise InputError(f"{building}: holds {others[0]}, which no merge has written; move it away")
    file = os.open(building, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_still(file, building):
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise RunIsBusy(f"{output}: another merge is at work on it; wait for it, or name another with --out") from None
    finally:
        os.close(file)
        with contextlib.suppress(OSError):
            building.rmdir()  # nothing was begun


def _is_still(file: int, folder: Path) -> bool:
    """Whoever held it before may have removed it."""
    return folder.exists() and os.path.samestat(os.fstat(file), folder.stat())


def publish(folder: Path, output: Path) -> None:
    """Give what was made its name; an older one is gone for the moment between two renames."""
    doomed = output.with_name(f".{output.name}.{secrets.token_hex(4)}.deleting")
    if os.path.lexists(output):
        os.rename(output, doomed)
    os.rename(folder, output)
    sync_folder(output.parent)
    clear_left(output)


def clear_left(output: Path) -> None:
    """Of a call that was killed behind the last rename, or has come out wrong."""
    clear(building_of(output))
    for doomed in output.parent.glob(f".{glob.escape(output.name)}.????????.deleting"):
        clear(doomed)


def empty(folder: Path) -> None:
    """What is in it; the folder itself is what a merge holds on to."""
    for path in folder.iterdir():
        clear(path)


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
