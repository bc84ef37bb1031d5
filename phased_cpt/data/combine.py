"""Sources become one JSONL file: whole records, each source by its weight, mixed evenly from beginning to end.

a.jsonl  1     a1 a2 a3 a4          a1 b3 a2 a3 b1 a4       each source in its own order, pass after pass
b.jsonl  0.5   b1 b2 b3 b4    →     which half of b it is, the seed decides
"""

import heapq
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from phased_cpt.config.schema import Data, Source
from phased_cpt.data.bin import beside
from phased_cpt.data.cache import Facts, Tell
from phased_cpt.data.chunks import Integers
from phased_cpt.data.files import File, Piece, find_files, pieces_of
from phased_cpt.data.mixing import drawn
from phased_cpt.data.prepare import cache_folder, found_files
from phased_cpt.data.records import BOM, Bad, Fields, Record, lines, records
from phased_cpt.data.render import Rendering
from phased_cpt.errors import InputError
from phased_cpt.plan import PhasePlan, Plan

MAX_LINE_BYTES: int = Data.model_fields["max_line_bytes"].default


@dataclass(frozen=True)
class Ingredient:
    """A source and how often its records come into the mix."""

    name: str
    files: Sequence[File]
    weight: float = 1.0
    text_field: str = "auto"
    where: Mapping[str, Any] = field(default_factory=dict)


def ingredients_named(sources: Sequence[str], text_field: str) -> list[Ingredient]:
    """As they are typed: PATH, or PATH:WEIGHT."""
    found = []
    for given in sources:
        path, _, weight = given.rpartition(":")
        if not path or not re.fullmatch(r"[0-9.eE+-]+", weight):
            path, weight = given, "1"
        try:
            source = Source(path=path, weight=float(weight))
        except ValueError:
            raise InputError(f"{given}: the weight is {weight}; allowed: above 0, at most 1000") from None
        found.append(Ingredient(path, find_files(source.path), source.weight, text_field))
    return found


def ingredients_of(phase: PhasePlan, plan: Plan, text_field: str | None) -> list[Ingredient]:
    """The sources of a phase, with their weights and what `data.where` keeps of them."""
    data = phase.settings.data
    return [
        Ingredient(
            source.path,
            found_files(source, cache_folder(plan)),
            source.weight,
            text_field or data.text_field,
            data.where,
        )
        for source in phase.phase.sources
    ]


@dataclass(frozen=True)
class _Counted:
    """What a source holds: of each of its records that are kept, how many bytes."""

    sizes: Integers

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())


def combine(
    ingredients: Sequence[Ingredient], output: Path, seed: int, temperature: float, force: bool, tell: Tell
) -> Facts:
    """Write the mix; the file appears when it is whole, and the same call writes the same bytes."""
    _require_place(output, ingredients, force)
    counted = []
    for ingredient in ingredients:
        counted.append(_Counted(np.array([size for _, size in _kept(ingredient)], np.int64)))
        if not counted[-1].bytes:
            raise InputError(f"{ingredient.name}: no record in it that could be mixed")
        tell(f"{ingredient.name}: {len(counted[-1].sizes):,} records, {counted[-1].bytes / 1e6:,.1f} MB")
    weights = _weights([each.weight for each in ingredients], [each.bytes for each in counted], temperature)
    which = [
        drawn(len(each.sizes), weight, "combine", seed, at)
        for at, (each, weight) in enumerate(zip(counted, weights, strict=True))
    ]
    streams = [_placed(at, ingredient, which[at]) for at, ingredient in enumerate(ingredients)]
    with beside(output) as file:
        for _, _, line in heapq.merge(*streams):
            file.write(line)
    sizes = [int(each.sizes[chosen].sum()) for each, chosen in zip(counted, which, strict=True)]
    planned = [weight * each.bytes for weight, each in zip(weights, counted, strict=True)]
    return {
        "output": str(output),
        "records": sum(map(len, which)),
        "bytes": output.stat().st_size,
        "seed": seed,
        "temperature": temperature,
        "sources": [
            {
                "source": ingredients[at].name,
                "weight": ingredients[at].weight,
                "records_there": len(counted[at].sizes),
                "records": len(which[at]),
                "text_bytes": sizes[at],
                "planned_share": round(planned[at] / math.fsum(planned), 6),
                "share": round(sizes[at] / sum(sizes), 6),
                "passes": round(len(which[at]) / len(counted[at].sizes), 4),
            }
            for at in range(len(ingredients))
        ],
    }


def _require_place(output: Path, ingredients: Sequence[Ingredient], force: bool) -> None:
    if not ingredients:
        raise InputError("no source is named: phased-cpt dataset combine OUT.jsonl a.jsonl b.jsonl:0.5")
    if output.suffix != ".jsonl":
        raise InputError(f"{output}: a record a line is written; give it a name that ends with .jsonl")
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"{output}: {'a folder' if output.is_dir() else 'no such folder'}; name a file in a folder")
    if output.exists() and not force:
        raise InputError(f"{output}: it is there already; name another, or add --force")
    if output.exists() and any(file.path.samefile(output) for each in ingredients for file in each.files):
        raise InputError(f"{output}: it is one of the sources, which are left as they are; name another file")


def _weights(weights: Sequence[float], sizes: Sequence[int], temperature: float) -> list[float]:
    """As given, or so that the shares go with (weight × size)^(1 / temperature) in a mix that is as large."""
    if temperature == 1:
        return list(weights)
    heights = [(weight * size) ** (1 / temperature) for weight, size in zip(weights, sizes, strict=True)]
    total = sum(Fraction(repr(weight)) * size for weight, size in zip(weights, sizes, strict=True))
    return [float(total) * height / math.fsum(heights) / size for height, size in zip(heights, sizes, strict=True)]


def _placed(number: int, ingredient: Ingredient, which: Integers) -> Iterator[tuple[float, int, bytes]]:
    """The chosen records, each with its place between 0 and 1."""
    passes = np.split(which, np.flatnonzero(np.diff(which) <= 0) + 1)
    for at, line in enumerate(itertools.chain.from_iterable(_chosen(ingredient, each) for each in passes)):
        yield (at + 0.5) / len(which), number, line


def _chosen(ingredient: Ingredient, which: Integers) -> Iterator[bytes]:
    wanted = iter(which.tolist())
    next_one = next(wanted, None)
    for at, (line, _) in enumerate(_kept(ingredient)):
        if at == next_one:
            yield line
            next_one = next(wanted, None)
        if next_one is None:
            return


# Records as they are ------------------------------------------------------------------------------------------------


def _kept(ingredient: Ingredient) -> Iterator[tuple[bytes, int]]:
    """Every record that counts, as a line, and the bytes that it is weighed by; the first bad one stops it."""
    rendering = Rendering(ingredient.text_field, dict(ingredient.where), False)
    ends: dict[int, int] = {}  # lines of the pieces of each file before this one
    for piece in pieces_of(ingredient.files, MAX_LINE_BYTES):
        file, line = ingredient.files[piece.file], 0
        for line, (raw, record) in enumerate(_read(ingredient.files, piece), 1):
            where = f"{file.path}, line {ends.get(piece.file, 0) + line}" if file.format != "text" else ingredient.name
            if isinstance(record, Bad):
                raise InputError(f"{where}: {record.reason}; mend it, or take it out")
            if record.fields is not None and rendering.keeps(record.fields):
                whole = _as_line(raw, record.fields, where)
                yield whole, _weighed(whole, record.fields, ingredient.text_field, where)
        ends[piece.file] = ends.get(piece.file, 0) + line


def _read(files: Sequence[File], piece: Piece) -> Iterator[tuple[bytes | None, Record | Bad]]:
    """The records of a piece; those of JSON lines with the very bytes that they are written in."""
    file = files[piece.file]
    if file.format == "tokens":
        raise InputError(f"{file.path}: it holds tokens, and no records that could be mixed; name its texts")
    found = records(files, piece, MAX_LINE_BYTES, ())
    if file.format == "json lines":
        yield from zip(lines(file, piece, MAX_LINE_BYTES), found, strict=True)
    else:
        yield from ((None, record) for record in found)


def _as_line(raw: bytes | None, fields: Fields, where: str) -> bytes:
    if raw is not None:
        return raw.removeprefix(BOM).rstrip(b"\r\n") + b"\n"
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: JSON cannot hold it: {error}; leave that column out of the file") from None


def _weighed(line: bytes, fields: Fields, text_field: str, where: str) -> int:
    """By the bytes of its text, if that is named; else by all of it."""
    if text_field == "auto":
        return len(line)
    if text_field not in fields:
        raise InputError(f"{where}: no field {text_field!r}; there are {', '.join(fields) or 'none'}")
    text = fields[text_field]
    return len((text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)).encode())
