"""Folders that are made once and found by their content: whole and sealed, or not there.

built beside (.<key>.building, under a lock) → sealed.json with the size and sha256 of every file → rename
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from phased_cpt.errors import PhasedCptError
from phased_cpt.run_dir import publish_file, sync_folder

SEAL = "sealed.json"
FORMAT = 2  # rises when what is stored changes its meaning: what an older release has made is made anew

RACY_NANOSECONDS = 2_000_000_000

Facts = dict[str, Any]
Tell = Callable[[str], None]


def key_of(*parts: Any) -> str:
    """A name made of contents: the same for the same parts, whatever the files are called."""
    canonical = json.dumps([FORMAT, *parts], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()[:32]


def make_once(folder: Path, build: Callable[[Path], Facts], tell: Tell) -> tuple[Facts, bool]:
    """The facts of a sealed folder, and whether it was there already; else one process builds it, and others wait."""
    facts = sealed_facts(folder)
    if facts is not None:
        return facts, True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder, tell):
        facts = sealed_facts(folder)  # another process may have built it meanwhile
        if facts is not None:
            return facts, True
        if folder.exists():
            tell(f"{folder}: damaged; it is made anew")
            shutil.rmtree(folder)
        _sweep(folder.parent)
        beside = _beside(folder)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            facts = build(beside)
            _seal(beside, folder, facts)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    return facts, False


def sealed_facts(folder: Path, thorough: bool = True) -> Facts | None:
    """What a sealed folder says of itself, if every file is what it was; None if it is damaged, or not there.

    Not thorough: only the sizes are compared, which costs nothing however large the files are.
    """
    parts = 2 if thorough else 1
    try:
        seal = json.loads((folder / SEAL).read_bytes())
        whole = all(_file_facts(folder / name, parts) == expected[:parts] for name, expected in seal["files"].items())
        facts: Facts | None = seal["facts"] if whole else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


def _seal(beside: Path, folder: Path, facts: Facts) -> None:
    """No fsync of what is large: were a part lost with the power, its sha256 would say so, and it is made anew."""
    files = {path.name: _file_facts(path) for path in sorted(beside.iterdir())}
    publish_file(beside / SEAL, json.dumps({"files": files, "facts": facts}, ensure_ascii=False).encode())
    os.replace(beside, folder)
    sync_folder(folder.parent)


def _file_facts(path: Path, parts: int = 2) -> list[int | str]:
    return [path.stat().st_size, sha256_of(path)] if parts == 2 else [path.stat().st_size]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _alone(folder: Path, tell: Tell) -> Iterator[None]:
    """Only one process builds; the kernel lets go when it dies, however it dies."""
    file = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another process prepares the same data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise PhasedCptError(f"{folder.parent}: this file system cannot lock files ({error.strerror})") from None
        yield
    finally:
        os.close(file)


def _sweep(parent: Path) -> None:
    """Take away what killed builds have left; one that is being built is locked, and stays."""
    for left in parent.glob(".*.building"):
        name = left.name.removeprefix(".").removesuffix(".building")
        file = os.open(parent / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(file)


# The digests of sources ----------------------------------------------------------------------------------------------


def file_digests(paths: list[Path], memory: Path) -> list[str]:
    """The sha256 of each file, read once: remembered by path, size, times and inode."""
    try:
        known: dict[str, list[Any]] = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        known = {}
    now = time.time_ns()
    stamps = {str(path): stamp(path) for path in paths}
    unknown = [path for path, times in stamps.items() if known.get(path, [None])[:-1] != times]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, digest in zip(unknown, threads.map(sha256_of, map(Path, unknown)), strict=True):
            known[path] = [*stamps[path], digest]
    if unknown:
        memory.parent.mkdir(parents=True, exist_ok=True)
        # A file may change once more within a tick of its clock, with the same times: such a young one is read again.
        kept = {path: known[path] for path, times in stamps.items() if now - times[1] > RACY_NANOSECONDS}
        publish_file(memory, json.dumps(kept).encode(), shared=True)
    return [known[str(path)][-1] for path in paths]


def stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
