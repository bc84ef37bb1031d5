"""The files of the merged model: cut by size beforehand, written one after the other, and gone on with after a kill.

model-00001-of-00003.safetensors.part ─ every byte read back ─ named ─ model-00001-of-00003.safetensors.done
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import torch
from torch import Tensor

from phased_cpt.data.cache import sha256_of
from phased_cpt.merge.check import Wrong
from phased_cpt.merge.pieces import Output, Piece
from phased_cpt.model.tensor_file import Shape, TensorFile, size_of
from phased_cpt.run_dir import publish_file, sync_folder

INDEX = "model.safetensors.index.json"
DONE = ".done"
PART_BYTES = 32 * 2**20  # of what is copied, at a time
# The bits that are all set where a number is none.
EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
CACHED = 2**18
WAITING = 2  # parts between the one who makes them and the one who writes


@dataclass(frozen=True)
class Shard:
    """One file, and what is to be in it."""

    name: str
    tensors: dict[str, Shape]

    @property
    def bytes(self) -> int:
        return sum(size_of(shape) for shape in self.tensors.values())


def cut(pieces: Iterable[Piece], largest: int) -> list[Shard]:
    """The tensors in order, as many in a file as it may be large; a tensor that is larger has one to itself."""
    cuts: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in (item for piece in pieces for item in piece.tensors.items()):
        if cuts[-1] and size + size_of(shape) > largest:
            cuts.append({})
            size = 0
        cuts[-1][name] = shape
        size += size_of(shape)
    if len(cuts) == 1:
        return [Shard("model.safetensors", cuts[0])]
    return [Shard(f"model-{n:05}-of-{len(cuts):05}.safetensors", each) for n, each in enumerate(cuts, 1)]


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Which tensor is in which file, where there are several."""
    if len(shards) > 1:
        where = {name: shard.name for shard in shards for name in shard.tensors}
        total = {"total_size": sum(shard.bytes for shard in shards)}
        publish_file(folder / INDEX, (json.dumps({"metadata": total, "weight_map": where}, indent=2) + "\n").encode())


def done_shards(folder: Path, shards: list[Shard]) -> dict[str, dict[str, Any]]:
    """Those that an earlier call has finished, and what it has noted of them; the bytes are looked at again."""
    found = {}
    for shard in shards:
        note = _note_of(folder, shard)
        try:
            facts = json.loads(note.read_bytes())
            if sha256_of(folder / shard.name) == facts["sha256"]:
                found[shard.name] = facts
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _note_of(folder: Path, shard: Shard) -> Path:
    """Beside the folder of the model, which is published as it is."""
    return folder.parent / f"{shard.name}{DONE}"


def write(
    output: Output,
    shards: list[Shard],
    folder: Path,
    *,
    looked_at: Callable[[], dict[str, Any]],
    advance: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Every file that is not there yet; what is known of each. `looked_at`: what was found out since the last one."""
    done = done_shards(folder, shards)
    advance(sum(shard.bytes for shard in shards if shard.name in done))
    of = {name: shard for shard in shards for name in shard.tensors}
    with _Writer(folder, shards, looked_at, advance) as writer:
        for piece in output.pieces:
            if all(of[name].name in done for name in piece.tensors):
                continue
            for name, part in _parts(output, piece):
                if of[name].name not in done:
                    writer.put(of[name], name, part)
    return done | writer.notes


def _parts(output: Output, piece: Piece) -> Iterator[tuple[str, Tensor]]:
    """The numbers of a piece: made, or read a part at a time."""
    if not piece.copied:
        yield from output.make(piece)
        return
    folder, name = output.base.folder, piece.copied
    stored, (dtype, shape) = folder.tensors[name], piece.tensors[name]
    if folder.is_mapped(name) or stored.bytes <= PART_BYTES:
        yield name, folder.read(name).to(dtype).reshape(tuple(shape))
        return
    for begin in range(0, stored.bytes, PART_BYTES):
        part = torch.empty(min(PART_BYTES, stored.bytes - begin), dtype=torch.uint8)
        folder.read_into(stored, part.numpy().data, begin)
        yield name, part.view(stored.dtype).to(dtype)


class _Writer:
    """A thread of its own: while it writes and hashes, the next tensor is made."""

    def __init__(
        self,
        folder: Path,
        shards: list[Shard],
        looked_at: Callable[[], dict[str, Any]],
        advance: Callable[[int], None],
    ) -> None:
        self._folder, self._advance, self._looked_at = folder, advance, looked_at
        self._parts: Queue[tuple[Shard, str, Tensor] | None] = Queue(WAITING)
        self._failed: BaseException | None = None
        self._sealer, self._sealing = ThreadPoolExecutor(1), list[Future[None]]()
        self._gone = False  # the one who makes them has failed
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self.notes: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "_Writer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._offer(None)
        elif self._failed is None:
            self._gone = True
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, shard: Shard, name: str, part: Tensor) -> None:
        self._offer((shard, name, part))

    def _offer(self, what: tuple[Shard, str, Tensor] | None) -> None:
        while True:
            self._raise()
            try:
                self._parts.put(what, timeout=0.2)
                return
            except Full:
                continue

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        try:
            now: _Open | None = None
            while (what := self._next()) is not None:
                shard, name, part = what
                if now is None or now.shard is not shard:
                    self._finish(now)
                    now = _Open(self._folder, shard)
                now.add(name, part)
                self._advance(part.nbytes)
                del what, part
            self._finish(now)
            for each in self._sealing:
                each.result()
        except BaseException as error:
            self._failed = error
        finally:
            self._sealer.shutdown()

    def _next(self) -> tuple[Shard, str, Tensor] | None:
        while not self._gone:
            try:
                return self._parts.get(timeout=0.2)
            except Empty:
                continue
        raise InterruptedError

    def _finish(self, now: "_Open | None") -> None:
        """In a thread of its own, too: the disk takes its time."""
        if now is not None:
            self._sealing.append(self._sealer.submit(self._seal, now, self._looked_at()))

    def _seal(self, now: "_Open", looked_at: dict[str, Any]) -> None:
        facts = {"sha256": now.close(), **looked_at}
        publish_file(_note_of(self._folder, now.shard), json.dumps(facts).encode())
        self.notes[now.shard.name] = facts


class _Open:
    """A file that is being written; every part is read back."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard, self._path = shard, folder / shard.name
        self._beside = folder / f"{shard.name}.part"
        self._file = TensorFile(self._beside, shard.tensors)
        self._back = os.open(self._beside, os.O_RDONLY | os.O_CLOEXEC)
        self._name, self._left = "", 0
        self._space = torch.empty(0, dtype=torch.uint8)  # for what is read back: new memory costs more than reading

    def add(self, name: str, part: Tensor) -> None:
        if not self._left:
            self._file.expect(name, self.shard.tensors[name])
            self._name, self._left = name, size_of(self.shard.tensors[name])
        _require_finite(name, part)
        at = self._file.write(part)
        self._require_written(name, part, at)
        self._left -= part.nbytes

    def close(self) -> str:
        digest = self._file.close()
        os.fsync(self._back)
        os.close(self._back)
        os.replace(self._beside, self._path)
        sync_folder(self._path.parent)
        return digest

    def _require_written(self, name: str, part: Tensor, at: int) -> None:
        if len(self._space) < part.nbytes:
            self._space = torch.empty(part.nbytes, dtype=torch.uint8)
        space = self._space[: part.nbytes]
        count = os.preadv(self._back, [space.numpy().data], at)
        same = part.contiguous().reshape(-1).view(torch.uint8)
        while count < len(space) and (more := os.preadv(self._back, [space.numpy().data[count:]], at + count)):
            count += more
        if not _same(space, same):
            raise Wrong(f"{self._beside}: {name} comes back from the disk as other bytes than were written")


def _require_finite(name: str, part: Tensor) -> None:
    """By the bits of the exponents, in pieces that stay in the cache: fifty times as fast as torch.isfinite."""
    if part.dtype not in EXPONENTS or not part.numel():
        return
    bits, exponent = EXPONENTS[part.dtype]
    if any(int((each & exponent).max()) == exponent for each in torch.split(part.reshape(-1).view(bits), CACHED)):
        raise Wrong(f"{name} is not finite after merging; the adapter, or the base, is damaged")


def _same(one: Tensor, other: Tensor) -> bool:
    """Of bytes: eight at a time, which is six times as fast."""
    whole = len(one) // 8 * 8
    words = torch.equal(one[:whole].view(torch.int64), other[:whole].view(torch.int64))
    return words and torch.equal(one[whole:], other[whole:])
