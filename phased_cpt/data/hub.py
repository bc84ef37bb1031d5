"""Data sets of the hub, by id and split: a process of its own loads them, because `datasets` takes a second to import.

id, split ─ python -m phased_cpt.data.load_dataset ─ <cache>/hub/<fingerprint>.parquet ─ read like any file
"""

import os
import subprocess
from pathlib import Path

from phased_cpt import children
from phased_cpt.errors import InputError


def downloaded(path: str, split: str | None, cache: Path) -> Path:
    """The Parquet file that holds this split of a data set; the hub's own cache is asked for what it has."""
    place = Path(path).expanduser() if path.startswith("~") else path
    if Path(place).is_file():
        raise InputError(f"{path}: this is a file, and a file has no split; take `split: {split}` out")
    folder = cache / "hub"
    folder.mkdir(parents=True, exist_ok=True)
    command = [*children.command("phased_cpt.data.load_dataset"), str(place), split or "train", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})  # noqa: S603
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
        what = "" if Path(place).exists() else "no such file or folder, and "
        raise InputError(f"{path}: {what}`datasets` cannot load it: {reason}")
    return Path(child.stdout.strip().splitlines()[-1])
