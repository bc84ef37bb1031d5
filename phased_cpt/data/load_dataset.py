"""A program of its own, because it loads `datasets`: writes one split of a data set as Parquet, and prints where.

python -m phased_cpt.data.load_dataset ID SPLIT FOLDER
"""

import os
import sys
from pathlib import Path

from datasets import Dataset, load_dataset
from pyarrow import parquet


def main(name: str, split: str, folder: str) -> None:
    """Named by what is in it, so that a split that was written before is not written again."""
    data = load_dataset(name, split=split)
    assert isinstance(data, Dataset)
    made = Path(folder) / f"{data._fingerprint}.parquet"
    if not _is_whole(made, len(data)):
        beside = made.with_suffix(f".{os.getpid()}.tmp")
        data.to_parquet(str(beside))
        os.replace(beside, made)
    print(made)  # noqa: T201 - the one who called reads it


def _is_whole(made: Path, rows: int) -> bool:
    try:
        return int(parquet.read_metadata(made).num_rows) == rows
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
