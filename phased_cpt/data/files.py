"""From what a source names to the files it means, and to pieces of them that can be read apart.

dataset/commits/*.jsonl → a.jsonl b.jsonl.gz → [a: bytes 0–8M] [a: 8M–11M] [b: unpacked 0–8M] …
"""

import glob
import gzip
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from phased_cpt.config.allowed import nearest
from phased_cpt.errors import InputError

PIECE_BYTES = 8 * 2**20  # small enough to share out and to show progress, large enough to forget the cost of sharing

# What is read how, by the name without .gz or .zst.
FORMATS = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json lines",
    ".txt": "text",
    ".parquet": "parquet",
    ".bin": "tokens",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# zstd files may begin with a frame that is to be skipped.
MAGIC = {"gzip": re.compile(rb"\x1f\x8b"), "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class File:
    """A file of a source."""

    path: Path
    format: str
    compression: str | None  # gzip, zstd, or None


@dataclass(frozen=True)
class Piece:
    """What a worker reads at once: bytes of a file, a row group of it, decompressed bytes, or several texts."""

    file: int  # index in the source, of the first one
    files: int = 1  # several only of texts: many are small
    start: int = 0
    end: int = 0
    content: bytes | None = None  # of a compressed file
    weight: int = 0  # bytes of the file that it stands for, to show progress


def find_files(path: str, tell: Callable[[str], None] = lambda message: None) -> list[File]:
    """The files that a source names, in the order of their names."""
    place = _expanded(path)
    if place.is_dir():
        files = _in_folder(place, path, tell)
    elif place.exists():
        files = [place]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]  # noqa: PTH207 - ~ and / may begin it
        files = [file for file in files if file.is_file()]
        if not files:
            what = "no file matches" if glob.has_magic(path) else "no such file or folder"
            near = nearest(path, [str(each) for each in place.parent.glob("*")])
            raise InputError(f"{path}: {what} (looked from {Path.cwd()}){near}")
    return [_file(file) for file in files]


def _in_folder(place: Path, path: str, tell: Callable[[str], None]) -> list[Path]:
    found = sorted(_walked(place))
    files = [file for file in found if _format(file)]
    others = [file for file in found if not _format(file) and not file.name.endswith(".bin.meta.json")]
    such = f"such as {others[0].relative_to(place)}" if others else ""
    if not files:
        there = f"; there are {len(others)} others, {such}" if others else ""
        raise InputError(f"{path}: no data files in this folder{there}; {_known()}")
    if others:
        tell(f"{path}: {len(files)} files are read; {len(others)} others are no data and left alone, {such}")
    return files


def is_hub_id(path: str) -> bool:
    """organisation/name, where nothing of that name lies on the disk."""
    place = _expanded(path)
    return not place.exists() and HUB_ID.fullmatch(path) is not None and not _format(place)


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no such user, so no such home folder") from None


def _walked(folder: Path) -> Iterator[Path]:
    """Every file below that is not hidden, links followed; a folder that cannot be read is no empty one."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: this folder cannot be read ({error.strerror})") from None

    seen = set()
    for name, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        stat = Path(name).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()  # a link that leads back
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (Path(name) / file for file in files if not file.startswith("."))


def _format(file: Path) -> str | None:
    if file.name.endswith(".bin.meta.json"):
        return None  # it belongs to its .bin
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in COMPRESSIONS]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _known() -> str:
    compressed = f"texts and JSON also with {' or '.join(COMPRESSIONS)} behind"
    return f"read are {', '.join(FORMATS)}, {compressed}; see dataset/README.md"


def _file(path: Path) -> File:
    kind = _format(path)
    if kind is None:
        raise InputError(f"{path}: what kind of file is this? {_known()}")
    if not path.is_file():
        raise InputError(f"{path}: {'neither a file nor a folder' if path.exists() else 'a link that leads nowhere'}")
    with path.open("rb") as file:
        head = file.read(4)
    compression = next((name for name, magic in MAGIC.items() if magic.match(head)), None)
    called = COMPRESSIONS.get(path.suffix.lower())
    if called and compression != called and head:
        raise InputError(
            f"{path}: called {path.suffix}, but there is no {called} data in it; rename it, or compress it"
        )
    if compression and kind in ("parquet", "tokens"):
        raise InputError(f"{path}: a {kind} file must not be compressed; unpack it")
    return File(path, kind, compression)


def pieces_of(files: Sequence[File], max_line_bytes: int) -> Iterator[Piece]:
    """What the workers share out, in order."""
    for texts, group in itertools.groupby(enumerate(files), key=lambda each: _is_small(each[1])):
        if texts:
            yield from _together(list(group))
            continue
        for index, file in group:
            size = file.path.stat().st_size
            if file.compression:
                yield from _decompressed(index, file, max_line_bytes)
            elif file.format == "parquet":
                yield from _row_groups(index, file, size)
            else:
                yield from _ranges(index, size, PIECE_BYTES if file.format == "json lines" else size)


def _is_small(file: File) -> bool:
    return file.format == "text" and not file.compression


def _together(files: Sequence[tuple[int, File]]) -> Iterator[Piece]:
    """Texts, as many as make a piece."""
    first = count = weight = 0
    for index, file in files:
        first = first if count else index
        count, weight = count + 1, weight + file.path.stat().st_size
        if weight >= PIECE_BYTES:
            yield Piece(first, count, weight=weight)
            count = weight = 0
    if count:
        yield Piece(first, count, weight=weight)


def _ranges(index: int, size: int, step: int) -> Iterator[Piece]:
    for start in range(0, max(size, 1), max(step, 1)):
        end = min(start + step, size)
        yield Piece(index, start=start, end=end, weight=end - start)


def _row_groups(index: int, file: File, size: int) -> Iterator[Piece]:
    groups = parquet_file(file.path).num_row_groups
    for group in range(groups):
        yield Piece(index, start=group, end=group + 1, weight=size // groups)
    if not groups:
        yield Piece(index)


def parquet_file(path: Path):  # type: ignore[no-untyped-def] # pyarrow has no types
    from pyarrow import ArrowInvalid, parquet  # 0.3 s, so only where it is needed

    try:
        return parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file that can be read: {error}") from None


def _decompressed(index: int, file: File, max_line_bytes: int) -> Iterator[Piece]:
    """Pieces of what is in a compressed file."""
    start = read = 0
    for content, position in _parts(file, max_line_bytes):
        yield Piece(index, 1, start, start + len(content), content, position - read)
        start, read = start + len(content), position


def _parts(file: File, max_line_bytes: int) -> Iterator[tuple[bytes, int]]:
    """What a compressed file holds, cut at ends of lines (a text: not cut), and how far it is read for that.

    Of a line that is too long only so much is kept that the reader sees it.
    """
    rest = b""
    with file.path.open("rb") as packed, _opened(file, packed) as stream:
        while block := _read(stream, file):
            cut = block.rfind(b"\n") + 1 if file.format == "json lines" else 0
            if cut:
                yield rest + block[:cut], packed.tell()
                rest = block[cut:]
            elif len(rest) <= max_line_bytes:
                rest = (rest + block)[: max_line_bytes + 1]
        yield rest, packed.tell()


def _opened(file: File, packed: IO[bytes]) -> IO[bytes]:
    if file.compression == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=packed))
    import pyarrow  # it knows zstd, so that no other library is needed for it

    return cast(IO[bytes], pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd"))


def _read(stream: IO[bytes], file: File) -> bytes:
    try:
        return stream.read(PIECE_BYTES)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise InputError(f"{file.path}: its {file.compression} data end early or are damaged ({error})") from None
