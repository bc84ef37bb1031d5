"""How long best fit takes and how full its rows are, beside TRL's own; and what it costs to find a row and to make it.

    python benchmarks/packing.py [--millions 1 2 5 10] [--repeats 3] [--no-trl]

Beside TRL where `trl` is installed. Lengths are drawn, not read: whoever packs gets the lengths of the pieces, no more.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from phased_cpt.data.blocks import Blocks, Shape
from phased_cpt.data.chunks import Slices
from phased_cpt.data.packing import best_fit, pack_best_fit
from phased_cpt.data.tokens import open_ids

MILLION = 10**6
CAPACITIES = (2048, 32768)
# Lognormal: the median length in tokens, and sigma. Code has more tiny files and more huge ones than prose.
LENGTHS = {"prose-like": (400, 1.0), "code-like": (250, 1.4)}


def ours(lengths: np.ndarray, capacity: int) -> int:
    """Packs the pieces, and says how many rows they took."""
    return int(best_fit(lengths, capacity).max()) + 1


# Part one.


def pieces(documents: int, median: int, sigma: float, capacity: int) -> np.ndarray:
    """Lengths of documents, the longer ones already cut into whole rows and a rest, as both packers want them."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, documents)
    lengths = np.maximum(1, drawn).astype(np.int64)
    whole, rest = np.divmod(lengths, capacity)
    cut = np.concatenate([rest[rest > 0], np.full(whole.sum(), capacity)])
    return np.random.default_rng(1).permutation(cut)


def trl(lengths: np.ndarray, capacity: int) -> Callable[[], int]:
    """TRL's packing alone. The table has no tokens in it (Arrow's null type), so that none are copied and timed."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    table = pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, pa.nulls(int(offsets[-1])))})
    return lambda: _pack_bfd(table, capacity, "split").num_rows


def time_packers(packers: dict[str, Callable[[], int]], repeats: int) -> dict[str, tuple[float, int]]:
    """Median seconds and the rows of each; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in packers}
    found: dict[str, int] = {}
    for _ in range(repeats):
        for name, pack in packers.items():
            begin = time.perf_counter()
            found[name] = pack()
            taken[name].append(time.perf_counter() - begin)
    return {name: (statistics.median(taken[name]), found[name]) for name in packers}


def packing(millions: list[float], repeats: int, with_trl: bool) -> None:
    print("| lengths | row | documents | pieces | packer | median s | ns a piece | rows / fewest possible | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for capacity in CAPACITIES:
        for kind, (median, sigma) in LENGTHS.items():
            for count in millions:
                lengths = pieces(int(count * MILLION), median, sigma, capacity)
                packers = {"best_fit": lambda lengths=lengths, capacity=capacity: ours(lengths, capacity)}
                if with_trl and count <= 1:  # a Python loop: it is linear too, and slow
                    packers["TRL bfd_split"] = trl(lengths, capacity)
                print_case(f"{kind} | {capacity:,} | {int(count * MILLION):,}", lengths, capacity, packers, repeats)


def print_case(
    case: str, lengths: np.ndarray, capacity: int, packers: dict[str, Callable[[], int]], repeats: int
) -> None:
    fewest = -(-int(lengths.sum()) // capacity)
    results = time_packers(packers, repeats)
    first = next(iter(results.values()))[0]
    for name, (seconds, count) in results.items():
        each = f"{seconds:.3f} | {seconds / len(lengths) * 1e9:,.0f}"
        print(
            f"| {case} | {len(lengths):,} | {name} | {each} | {count / fewest:.5f} | {seconds / first:.1f} |",
            flush=True,
        )


# Part two.


def blocks(documents: int, median: int, sigma: float, capacity: int, folder: Path) -> Blocks:
    """A packed split over a store of as many tokens; the file is sparse, so it takes no room and reads like memory."""
    lengths = np.random.default_rng(0).lognormal(np.log(median), sigma, documents).astype(np.int64) + 1
    with (folder / "ids.bin").open("wb") as file:
        file.truncate(int(lengths.sum()) * 2)
    each = Slices.of_documents(np.zeros(documents, np.int64), np.cumsum(lengths) - lengths, lengths)
    packed = pack_best_fit(each, capacity, capacity // 16, False)
    return Blocks([open_ids(folder, "uint16")], packed.slices, packed.first, Shape(capacity, eos_id=0, pad_id=0))


def microseconds(call: Callable[[int], object], keys: list[int]) -> np.ndarray:
    """How long each single call takes, the second time: at the first, the pages of the file are mapped."""
    taken = []
    for key in keys + keys:
        begin = time.perf_counter_ns()
        call(key)
        taken.append(time.perf_counter_ns() - begin)
    return np.array(taken[len(keys) :]) / 1000


def rows(millions: list[float]) -> None:
    """To find a block anywhere, and to make its row."""
    print("\n| lengths | row | documents | blocks | to find one: median, 99 % | to make its row | ns a token |")
    print("|---|---|---|---|---|---|---|")
    for capacity in CAPACITIES:
        for kind, (median, sigma) in LENGTHS.items():
            for count in (min(millions), max(millions)):
                with tempfile.TemporaryDirectory() as folder:
                    made = blocks(int(count * MILLION), median, sigma, capacity, Path(folder))
                    keys = np.random.default_rng(2).integers(0, len(made), 1000).tolist()
                    found, row = microseconds(made.slices_of, keys), microseconds(made.__getitem__, keys)
                case = f"{kind} | {capacity:,} | {int(count * MILLION):,} | {len(made):,}"
                finding = f"{np.median(found):.1f} µs, {np.percentile(found, 99):.1f} µs"
                making = f"{np.median(row):.0f} µs | {np.median(row) * 1000 / capacity:.1f}"
                print(f"| {case} | {finding} | {making} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 2, 5, 10], help="of documents")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-trl", action="store_true", help="only ours")
    given = parser.parse_args()
    with_trl = not given.no_trl and importlib.util.find_spec("trl") is not None
    names = ("numpy", "trl") if with_trl else ("numpy",)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {versions}, medians of {given.repeats}\n")
    packing(given.millions, given.repeats, with_trl)
    rows(given.millions)


if __name__ == "__main__":
    main()
