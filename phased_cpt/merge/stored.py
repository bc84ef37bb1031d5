"""The tensors of a folder of weights, one by one: of the files only the heads are read until a tensor is asked for.

safetensors are read by position, not mapped: what has been read leaves nothing in this process.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phased_cpt.errors import InputError
from phased_cpt.model.tensor_file import NAMES

TYPES = {name: dtype for dtype, name in NAMES.items()}
WHOLE = 2**30  # read(2) gives 2 GiB at most


@dataclass(frozen=True)
class Stored:
    """One tensor, and where it lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    bytes: int


class Folder:
    """The weights of a model, or of an adapter."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self._files: dict[Path, int] = {}
        self._pickled: dict[str, Tensor] = {}
        self.tensors: dict[str, Stored] = {}
        for path in _files_of(folder, stem):
            if path.suffix == ".bin":
                self._add_pickled(path)
            else:
                self.tensors |= dict(_head_of(path))

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        stored = self.tensors[name]
        if name in self._pickled:
            return self._pickled[name].clone()
        found = torch.empty(stored.bytes, dtype=torch.uint8)
        self.read_into(stored, found.numpy().data)
        return found.view(stored.dtype).view(stored.shape)

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some of the rows of a matrix."""
        stored = self.tensors[name]
        row = stored.bytes // stored.shape[0]
        found = torch.empty((end - begin) * row, dtype=torch.uint8)
        self.read_into(stored, found.numpy().data, begin * row)
        return found.view(stored.dtype).view(end - begin, *stored.shape[1:])

    def read_into(self, stored: Stored, space: memoryview, begin: int = 0) -> None:
        """The bytes of a tensor from `begin` on, as many as there is space for."""
        if (file := self._files.get(stored.file)) is None:
            file = self._files[stored.file] = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
        at, done = stored.offset + begin, 0
        while done < len(space):
            count = os.preadv(file, [space[done : done + WHOLE]], at + done)
            if not count:
                raise InputError(f"{stored.file}: damaged, it ends in the midst of its tensors")
            done += count

    def is_mapped(self, name: str) -> bool:
        return name in self._pickled

    def _add_pickled(self, path: Path) -> None:
        """An older format: mapped, so that only what is asked for is read; and nothing in it is run."""
        for name, tensor in torch.load(path, mmap=True, weights_only=True, map_location="cpu").items():
            self._pickled[name] = tensor
            self.tensors[name] = Stored(path, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)


def _files_of(folder: Path, stem: str) -> list[Path]:
    """Those that the index names; without one, all there are."""
    for suffix in ("safetensors", "bin"):
        index = folder / f"{'pytorch_model' if suffix == 'bin' else stem}.{suffix}.index.json"
        if index.exists():
            return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        whole = folder / f"{'pytorch_model' if suffix == 'bin' and stem == 'model' else stem}.{suffix}"
        if whole.exists():
            return [whole]
    raise InputError(f"{folder}: no weights in it ({stem}.safetensors)")


def _head_of(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("its head is longer than the file")
            head = json.loads(file.read(length))
        for name, each in head.items():
            if name != "__metadata__":
                begin, end = each["data_offsets"]
                stored = Stored(path, TYPES[each["dtype"]], tuple(each["shape"]), 8 + length + begin, end - begin)
                if stored.offset + stored.bytes > size:
                    raise ValueError("it ends in the midst of its tensors")
                yield name, stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no safetensors file that can be read: {error}") from None
