"""A safetensors file, written tensor after tensor: their sizes are known, so its head can be written first.

length ─ {"name": {"dtype", "shape", "data_offsets"}, …} ─ bytes of the first ─ bytes of the second ─ …

The library's own writer wants all of them in memory at once.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.bool: "BOOL",
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
ALIGNMENT = 8
Shape = tuple[torch.dtype, Sequence[int]]


class TensorFile:
    """Tensors come in the order in which they were announced."""

    def __init__(self, path: Path, announced: Mapping[str, Shape], beat: Callable[[], None] = lambda: None) -> None:
        self._beat = beat  # a sign of life for each: some take minutes
        self._left = list(announced.items())
        self._hash = hashlib.sha256()
        self._file, self._at = path.open("wb", buffering=0), 0
        head = json.dumps({"__metadata__": {"format": "pt"}, **_placed(announced)}).encode()
        head += b" " * (-len(head) % ALIGNMENT)
        self._write(len(head).to_bytes(8, "little") + head)

    def add(self, name: str, tensor: Tensor) -> None:
        self.expect(name, (tensor.dtype, tensor.shape))
        self.write(tensor)

    def expect(self, name: str, found: Shape) -> None:
        """What is written next, whole or in parts."""
        announced, (dtype, shape) = self._left.pop(0)
        if (name, found[0], tuple(found[1])) != (announced, dtype, tuple(shape)):
            raise ValueError(f"{announced} {dtype} {list(shape)} was announced, not {name} {list(found[1])}")

    def write(self, part: Tensor) -> int:
        """Where in the file it begins."""
        self._beat()
        at = self._at
        self._write(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return at

    def close(self) -> str:
        """The sha256 of it all."""
        self._file.close()
        if self._left:
            raise ValueError(f"{self._left[0][0]} was announced, and never came")
        return self._hash.hexdigest()

    def _write(self, content: bytes | memoryview) -> None:
        self._hash.update(content)
        self._at += len(content)
        while content:  # write(2) takes 2 GiB at most
            content = content[self._file.write(content) :]


def size_of(shape: Shape) -> int:
    """In bytes."""
    return math.prod(shape[1]) * shape[0].itemsize


def _placed(announced: Mapping[str, Shape]) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    at = 0
    for name, (dtype, shape) in announced.items():
        end = at + size_of((dtype, shape))
        found[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return found
