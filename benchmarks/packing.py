"""How long best fit takes and how full its rows are, beside TRL's own; and what it costs to find a row and to make it.

    python benchmarks/packing.py [--millions 1 2 5 10] [--repeats 3] [--no-trl]

It needs `trl`. Lengths are drawn, not read: whoever packs gets the lengths of the pieces and nothing else.
"""

import argparse
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import numpy as np

MILLION = 10**6
CAPACITIES = (2048, 32768)
# Lognormal: the median length in tokens, and sigma. Code has more tiny files and more huge ones than prose.
LENGTHS = {"prose-like": (400, 1.0), "code-like": (250, 1.4)}


def ours(lengths: np.ndarray, capacity: int) -> int:
    """The adapter, and all that this file knows of ours: packs the pieces, and says how many rows they took."""
    from phased_cpt.data.packing import best_fit

    return int(best_fit(lengths, capacity).max()) + 1  # it says the block of each piece


def rows() -> None:
    """Part two: finding a block by its number, and making a row of it; the two are to be timed apart.

    To be filled in with phased_cpt.data.blocks: open a prepared index of some million blocks, draw 10,000 numbers with
    a fixed seed, and print_each("locate", ...) and print_each("materialise", ...) with what does either.
    """


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
    begin = time.perf_counter()
    ours(np.array([3, 2, 1]), 4)
    print(f"first call of ours, imports and all: {time.perf_counter() - begin:.2f} s\n")
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


# Part two: the helpers of rows().


def nanoseconds(call: Callable[[Any], object], keys: Iterable[Any]) -> list[int]:
    """How long each single call takes; one call that is not counted goes before, for what is done only once."""
    keys = list(keys)
    call(keys[0])
    taken = []
    for key in keys:
        begin = time.perf_counter_ns()
        call(key)
        taken.append(time.perf_counter_ns() - begin)
    return taken


def print_each(name: str, call: Callable[[Any], object], keys: Iterable[Any]) -> None:
    """One line: the median and the slow tail, in microseconds."""
    taken = np.array(nanoseconds(call, keys)) / 1000
    middle, late, worst = np.percentile(taken, [50, 99, 100])
    print(f"{name}: median {middle:.1f} µs, 99 % within {late:.1f} µs, worst {worst:.1f} µs, of {len(taken):,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 2, 5, 10], help="of documents")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-trl", action="store_true", help="only ours")
    given = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "trl"))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {versions}, medians of {given.repeats}\n")
    packing(given.millions, given.repeats, not given.no_trl)
    rows()


if __name__ == "__main__":
    main()
