"""What is saved of a phase under way: folders that count only when sealed, and are believed only when whole.

.checkpoint-40.building/   its files ─ manifest.json, last: size and sha256 of each ─ renamed ─→ checkpoint-40/
best-30/                   the same, of the best weights alone; a checkpoint names the one that it stands on
checkpoint-40.damaged/     set aside, and never used again

Their order is that of the steps; clocks and file times decide nothing.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phased_cpt.data.cache import sha256_of
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.ledger.fingerprint import digest_of
from phased_cpt.run_dir import copied, publish_file, sync_folder

FORMAT = 1
MANIFEST = "manifest.json"
CHECKPOINT, BEST = "checkpoint", "best"


class MadeByNewer(PhasedCptError):  # noqa: N818
    """A format that this version does not know."""


@dataclass(frozen=True)
class Manifest:
    """What a folder says of itself."""

    step: int
    phase: str
    fingerprint: str  # of the phase
    best: int | None = None  # the step of the best weights so far, which lie in a folder of their own
    made_by: dict[str, Any] = field(default_factory=dict)  # ranks, ZeRO stage, versions: for people
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # size and sha256
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True)
class Sealed:
    """A whole folder."""

    folder: Path
    manifest: Manifest

    @property
    def optimizer_files(self) -> dict[str, tuple[int, str]]:
        """What of it says what the optimizer knew; its other files tell the time, too."""
        return {name: each for name, each in self.manifest.files.items() if name.startswith("optimizer")}


# Made --------------------------------------------------------------------------------------------------------------


def building(folder: Path) -> Path:
    """Where the files of a folder are written before it has its name; empty."""
    beside = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def seal(folder: Path, manifest: Manifest, digests: dict[str, str]) -> None:
    """Give a built folder its manifest, and then its name. What was hashed while it was written is not read again."""
    beside, files = folder.with_name(f".{folder.name}.building"), {}
    for path in sorted(beside.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = (path.stat().st_size, digests.get(path.name) or sha256_of(path))
    values = asdict(manifest) | {"files": files}
    publish_file(beside / MANIFEST, (json.dumps(values | {"digest": digest_of(values)}, indent=1) + "\n").encode())
    remove(folder)
    os.rename(beside, folder)
    sync_folder(folder.parent)


def remove(folder: Path) -> None:
    """Renamed first: a kill in between leaves nothing that looks like a damaged one."""
    if os.path.lexists(folder):
        doomed = folder.with_name(f".{folder.name}.deleting")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def retain(checkpoints: Path, keep: int, best: int | None) -> None:
    """The newest so many checkpoints stay, and every best slot that one of them, or the course now, stands on."""
    folders = [folder for _, folder in of_kind(checkpoints, CHECKPOINT)]
    for folder in folders[keep:]:
        remove(folder)
    needed = {best, *map(_stands_on, folders[:keep])}
    for step, folder in of_kind(checkpoints, BEST):
        if step not in needed:
            remove(folder)


def _stands_on(folder: Path) -> int | None:
    try:
        return _manifest(folder).best
    except PhasedCptError:
        return None  # damaged since, which ends no training: whoever goes on takes another


# Found -------------------------------------------------------------------------------------------------------------


def of_kind(checkpoints: Path, kind: str) -> list[tuple[int, Path]]:
    """The folders of that name, sealed or not, the last step first."""
    paths = checkpoints.iterdir() if checkpoints.is_dir() else []
    named = ((re.fullmatch(rf"{kind}-(\d+)", path.name), path) for path in paths)
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def newest(checkpoints: Path, fingerprint: str, tell: Callable[[str], None]) -> Sealed | None:
    """The last whole checkpoint of a phase; what is not whole is set aside and told."""
    found = of_kind(checkpoints, CHECKPOINT)
    for _, folder in found:
        if (fault := fault_of(folder, fingerprint)) is None:
            return Sealed(folder, _manifest(folder))
        aside = set_aside(folder, "damaged")
        tell(f"{folder}: {fault}; it is not used, and is now {aside.name}")
    if found:
        tell(f"{checkpoints}: no whole checkpoint is left; the phase begins again from what it started from")
    return None


def found_in(folder: Path) -> Sealed:
    """A folder that is known to be whole."""
    return Sealed(folder, _manifest(folder))


def named(checkpoints: Path, fingerprint: str, name: str) -> Sealed:
    """A checkpoint that the user names by its step or its folder, whole or refused; one from elsewhere is copied."""
    folder = checkpoints / f"{CHECKPOINT}-{name}" if name.isdecimal() else Path(name).expanduser()
    if not folder.is_dir():
        there = ", ".join(str(step) for step, _ in of_kind(checkpoints, CHECKPOINT)) or "none"
        raise InputError(f"--resume: {folder}: no such checkpoint; in {checkpoints} there are steps: {there}")
    if (fault := fault_of(folder, fingerprint)) is not None:
        raise InputError(f"--resume: {folder}: {fault}; name another, or `none` to begin the phase anew")
    manifest = _manifest(folder)
    target = checkpoints / f"{CHECKPOINT}-{manifest.step}"
    if folder.resolve() != target.resolve():
        if manifest.best is not None:
            _copied(_slot_of(folder, manifest.best), checkpoints / f"{BEST}-{manifest.best}")
        _copied(folder, target)
    return Sealed(target, manifest)


def _copied(source: Path, place: Path) -> None:
    if source.resolve() == place.resolve():
        return
    beside = building(place)
    shutil.copytree(source, beside, dirs_exist_ok=True)
    for path in beside.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if os.path.lexists(place):
        set_aside(place, "aside")
    os.rename(beside, place)
    sync_folder(place.parent)


def clear_after(checkpoints: Path, step: int) -> None:
    """Nothing lies beyond the step that is gone on from: checkpoints are set aside, and all else of it goes."""
    for found, folder in of_kind(checkpoints, CHECKPOINT):
        if found > step:
            set_aside(folder, "aside")
    for found, folder in of_kind(checkpoints, BEST):
        if found > step:
            remove(folder)
    for left in checkpoints.glob(".*") if checkpoints.is_dir() else []:
        shutil.rmtree(left, ignore_errors=True)


def set_aside(folder: Path, why: str) -> Path:
    """Under a name that nothing looks for."""
    names = (folder.with_name(f"{folder.name}.{why}{'' if n == 1 else n}") for n in range(1, 1000))
    aside = next(name for name in names if not os.path.lexists(name))
    best = _stands_on(folder) if folder.name.startswith(CHECKPOINT) else None
    slot = folder.parent / f"{BEST}-{best}"
    if best is not None and slot.is_dir():
        beside = aside.with_name(f"{aside.name}.{BEST}")
        shutil.rmtree(beside, ignore_errors=True)  # of a call that was killed here
        shutil.copytree(slot, beside, copy_function=copied)
    os.rename(folder, aside)
    sync_folder(folder.parent)
    return aside


# Believed ----------------------------------------------------------------------------------------------------------


def fault_of(folder: Path, fingerprint: str) -> str | None:
    """What is wrong with a checkpoint, or with the best weights that it stands on; None where all is well."""
    try:
        manifest = _manifest(folder)
        fault = next(_faults(folder, manifest, fingerprint), None)
        if manifest.best is not None and fault is None:
            slot = _slot_of(folder, manifest.best)
            fault = next((f"{slot.name}, on which it stands: {each}" for each in _slot_faults(slot, fingerprint)), None)
        return fault
    except MadeByNewer:
        raise  # no damage: an older program must not set aside what it cannot read
    except PhasedCptError as error:
        return str(error)
    except OSError as error:  # a disk, or a link that leads nowhere
        return f"{error.filename}: {error.strerror}"


def _slot_of(folder: Path, best: int) -> Path:
    """Where the best weights are; what was set aside has them beside it."""
    own = folder.with_name(f"{folder.name}.{BEST}")
    return own if own.is_dir() else folder.parent / f"{BEST}-{best}"


def _slot_faults(slot: Path, fingerprint: str) -> Iterator[str]:
    yield from _faults(slot, _manifest(slot), fingerprint)


def _faults(folder: Path, manifest: Manifest, fingerprint: str) -> Iterator[str]:
    """In the order of what they cost to find; whoever asks for a second one may find what the first has caused."""
    if manifest.fingerprint != fingerprint:
        yield f"made by another phase ({manifest.phase}, fingerprint {manifest.fingerprint[:12]}…)"
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    yield from (f"{name} is missing" for name in sorted(manifest.files.keys() - there))
    yield from (f"{name} was not there when it was sealed" for name in sorted(there - manifest.files.keys()))
    for name, (size, _) in manifest.files.items():
        if (found := (folder / name).stat().st_size) != size:
            yield f"{name} has {found:,} bytes, not {size:,}"
    for name, (_, digest) in manifest.files.items():
        if sha256_of(folder / name) != digest:
            yield f"{name} has other bytes than when it was sealed"


def _manifest(folder: Path) -> Manifest:
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
        if values.pop("digest") != digest_of(values):
            raise ValueError
        if values["format"] > FORMAT:
            raise MadeByNewer(f"{folder}: made by a newer phased_cpt (format {values['format']}); upgrade to go on")
        return Manifest(
            **values | {"files": {name: (size, digest) for name, (size, digest) in values["files"].items()}}
        )
    except MadeByNewer:
        raise
    except FileNotFoundError:
        raise PhasedCptError("never sealed (it has no manifest.json)") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise PhasedCptError("its manifest.json is damaged") from None
