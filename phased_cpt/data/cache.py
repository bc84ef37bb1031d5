"""Folders that are made once and found by their content: whole and sealed, or not there.

built beside (.<key>.<random>.building, under a lock) → sealed.json with the size and sha256 of every file → rename
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
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
    with _alone(folder, tell):
        facts = sealed_facts(folder)  # another process may have built it meanwhile
        if facts is not None:
            return facts, True
        if folder.exists() or folder.is_symlink():
            tell(f"{folder}: damaged; it is made anew")
            _remove(folder)
        _sweep(folder)
        # A name of its own: were the cache deleted meanwhile, somebody else may be building there already.
        beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.building")
        beside.mkdir()
        try:
            facts = build(beside)
            _seal(beside, folder, facts)
        except FileNotFoundError as error:
            if beside.is_dir():
                raise
            raise PhasedCptError(f"{folder.parent}: deleted while it was written to ({error}); run it again") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return facts, False


def _remove(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def sealed_facts(folder: Path, thorough: bool = True) -> Facts | None:
    """What a sealed folder says of itself, if every file is what it was; None if it is damaged, or not there.

    Not thorough: only the sizes are compared, which costs nothing however large the files are.
    """
    parts = 2 if thorough else 1
    try:
        seal = json.loads((folder / SEAL).read_bytes())
        files, facts = seal["files"], seal["facts"]
        whole = seal["digest"] == key_of(files, facts)
        whole = whole and all(_file_facts(folder / name, parts) == files[name][:parts] for name in files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(facts) if whole else None


def _seal(beside: Path, folder: Path, facts: Facts) -> None:
    """No fsync of what is large: were a part lost with the power, its sha256 would say so, and it is made anew."""
    files = {path.name: _file_facts(path) for path in sorted(beside.iterdir())}
    seal = {"files": files, "facts": facts, "digest": key_of(files, facts)}
    publish_file(beside / SEAL, json.dumps(seal).encode())
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
    file = _locked(folder, fcntl.LOCK_NB)
    if file is None:
        tell("another process prepares the same data; waiting for it")
        file = _locked(folder, 0)
    assert file is not None
    try:
        yield
    finally:
        os.close(file)


def _locked(folder: Path, mode: int) -> int | None:
    """The lock of a folder, or None where another process holds it and this one is not to wait."""
    path = folder.with_name(f"{folder.name}.lock")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | mode)
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass  # the cache was deleted meanwhile: this lock holds nobody off
        except OSError as error:
            os.close(file)
            raise PhasedCptError(f"{folder.parent}: this file system cannot lock files ({error.strerror})") from None
        os.close(file)


def _sweep(folder: Path) -> None:
    """Take away what killed builds have left, of this folder (whose lock is held) and of others that nobody builds."""
    for left in folder.parent.glob(".*.building"):
        name = left.name.split(".")[1]
        file = None if name == folder.name else _locked(left.with_name(name), fcntl.LOCK_NB)
        if file is not None or name == folder.name:
            shutil.rmtree(left, ignore_errors=True)
        if file is not None:
            os.close(file)


# The digests of sources ----------------------------------------------------------------------------------------------


def file_digests(paths: list[Path], memory: Path) -> list[str]:
    """The sha256 of each file, read once: remembered by path, size, times and inode."""
    known = remembered(memory)
    now = time.time_ns()
    stamps = {str(path): stamp(path) for path in paths}
    unknown = [path for path, times in stamps.items() if not _is_known(known.get(path), times)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, digest in zip(unknown, threads.map(sha256_of, map(Path, unknown)), strict=True):
            known[path] = [*stamps[path], digest]
    if unknown:
        memory.parent.mkdir(parents=True, exist_ok=True)
        # A file may change once more within a tick of its clock, with the same times: such a young one is read again.
        kept = {path: known[path] for path, times in stamps.items() if now - times[1] > RACY_NANOSECONDS}
        publish_file(memory, json.dumps(kept).encode(), shared=True)
    return [known[str(path)][-1] for path in paths]


def _is_known(entry: Any, times: list[int]) -> bool:
    return isinstance(entry, list) and entry[:-1] == times


def remembered(file: Path) -> dict[str, Any]:
    """What was remembered, or nothing: none of it is needed."""
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(file: Path, what: dict[str, Any]) -> None:
    """For the next time, where one can write."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        publish_file(file, json.dumps(what).encode(), shared=True)


def stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
