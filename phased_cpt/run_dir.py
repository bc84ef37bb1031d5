"""Every path of a run in one place, and how a file appears there: whole, or not at all."""

import errno
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from phased_cpt.errors import PhasedCptError

_STAMP = "%Y%m%d_%H%M%S"

CHECKPOINTS = "checkpoints"  # in the folder of a phase, while it is under way
CARRIED = "carried"  # there: what the optimizer knew at its end, for a phase that goes on with it
DATA = "data.json"  # there: what it is trained on, in figures
GATE = "gate.json"  # there: what its gate has said, before anybody else hears of it
MERGED_BASE = "merged_base"  # there, too: what it has published, as the next phase starts from it after a merge

# What a run writes into its folder, besides its phases.
OWN_NAMES = (
    "archive",
    "config_resolved.yaml",
    "control",
    "final_model",
    "forgetting.json",
    "logs",
    "random_base",
    "ranks.lock",
    "report.html",
    "run.json",
    "run.lock",
    "tensorboard",
    "tokenizer",
    "wandb",
)
# What is made from all phases, and so goes with any of them that is redone (as the merged model does).
MADE_FROM_ALL_PHASES = ("final_model", "forgetting.json", "report.html")


def phase_folder(number: int, name: str) -> str:
    return f"phase{number}_{name}"


def is_phase_folder(name: str) -> bool:
    return re.match(r"phase\d+_", name) is not None


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Nothing in it points outside, so that it can be moved."""

    root: Path

    @property
    def ledger(self) -> Path:
        return self.root / "run.json"

    @property
    def config_resolved(self) -> Path:
        return self.root / "config_resolved.yaml"

    @property
    def lock(self) -> Path:
        return self.root / "run.lock"

    @property
    def forgetting(self) -> Path:
        return self.root / "forgetting.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def ranks_lock(self) -> Path:
        return self.root / "ranks.lock"

    @property
    def archives(self) -> Path:
        """Where what was redone is kept: 1, 2, …"""
        return self.root / "archive"

    def archive(self, number: int) -> Path:
        return self.archives / str(number)

    def phase_folders(self) -> list[Path]:
        """The folders that phases have left here."""
        return sorted(path for path in self.root.iterdir() if is_phase_folder(path.name)) if self.root.is_dir() else []


def new_run_folder(output_dir: Path, name: str, now: datetime | None = None) -> Path:
    """<output_dir>/<name>-<UTC time>, which makes the newest the last in order; a second later if it is taken."""
    time = now or datetime.now(UTC)
    while (folder := output_dir / f"{name}-{time.strftime(_STAMP)}").exists():
        time += timedelta(seconds=1)
    return folder


def run_folders(output_dir: Path, name: str) -> list[Path]:
    """The folders of the runs of a name, newest first: by the time in their names, whatever the clock did since."""
    pattern = re.compile(re.escape(name) + r"-\d{8}_\d{6}")
    paths = output_dir.iterdir() if output_dir.is_dir() else []
    return sorted((path for path in paths if pattern.fullmatch(path.name) and path.is_dir()), reverse=True)


def publish_file(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Write beside, fsync, rename, fsync the folder: a reader sees the old content or the new, at any instant.

    `shared`: several may publish it at once. Others leave no file behind that the next call does not reuse.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp" if shared else f".{path.name}.tmp")
    file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            while content:
                content = content[os.write(file, content) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a rename last: until the folder is on disk, so is only its old list of names."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def copied(source: Path | str, target: Path | str) -> None:
    """A second name of the same bytes, where the file system has such; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def require_room(folder: Path, needed: int, what: str, mend: str = "") -> None:
    """On the disk of a folder, besides what is in it already."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free + there:
        said = f"{what} take {in_bytes(needed)}, and {in_bytes(free + there)} are free; make room there"
        raise PhasedCptError(f"{folder}: {said}{mend}")


def disk_failed(error: OSError, folder: Path | None, stands: str = "") -> PhasedCptError:
    """What a disk has refused, where, and what is left of it."""
    place = str(error.filename or folder or "")
    what = ": ".join(filter(None, (place, error.strerror or str(error))))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = next(path for path in (Path(place).resolve(), *Path(place).resolve().parents) if path.exists())
        what += f" ({in_bytes(shutil.disk_usage(there).free)} free); make room, and the same command goes on"
    return PhasedCptError("; ".join(filter(None, (what, stands))))


def in_bytes(size: float) -> str:
    """For a message or a table: 15.2 GB, 38.6 MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
