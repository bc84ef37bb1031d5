"""Where the run writes: whose folder it is, whether it may, and whether there is room."""

import datetime
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from phased_cpt.errors import InputError
from phased_cpt.ledger import amended, holder_of, next_archive, read_record, reconcile
from phased_cpt.preflight.hub import RemoteBase
from phased_cpt.preflight.scene import Scene, Skipped
from phased_cpt.preflight.seen import Seen, fail, ok, warn
from phased_cpt.run_dir import in_bytes

LATE_SECONDS = 60.0  # between the clock of a file system and ours: NFS servers have one of their own
# A clock that was reset says 1970; names and times of runs would go backwards.
BUILT = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def run_folder(scene: Scene) -> Iterator[Seen]:
    """Which it is, and that no other run is at work there."""
    chosen = scene.run_dir.made()
    if holder := holder_of(chosen):
        yield fail(f"{chosen.root}: another run is at work here ({holder})", "wait for it, or stop it")
    elif chosen.ledger.exists():
        yield ok(f"{chosen.root}, which goes on")
    else:
        yield ok(f"{chosen.root}, which is new")


def ledger(scene: Scene) -> Iterator[Seen]:
    """What has been done there is what is asked for; else the run would refuse, in these words."""
    chosen = scene.run_dir.given()
    record = read_record(chosen)
    if record is None:
        yield ok("nothing has been done yet")
        return
    plan = amended(scene.by_ranks.given(), record, scene.redo_from)
    record = reconcile(record, plan, scene.redo_from, next_archive(chosen))
    done = [phase.name for phase in record.phases if phase.state == "done"]
    yield ok(f"{len(done)} of {len(record.phases)} phases are done" + (f": {', '.join(done)}" if done else ""))


def write_access(scene: Scene) -> Iterator[Seen]:
    """Files can be made and locked in the run folder and in the cache; their places only, where they are not there."""
    for path in (scene.root, scene.cache.resolve()):
        if files := [each for each in (path, *path.parents) if each.is_file()]:
            mend = "name another folder (run.output_dir, run.cache_dir)"
            yield fail(f"{files[0]} is a file, and a folder is needed there", mend)
            return
    for place in dict.fromkeys(there(path) for path in (scene.root, scene.cache.resolve())):
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(f"{place} cannot be written to; name another folder (run.output_dir, run.cache_dir)")
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            what = f"{place}: a file cannot be made and locked there ({error.strerror})"
            yield fail(what, "name another folder (run.output_dir, run.cache_dir); of NFS, mount it with its locks")
        else:
            yield ok(f"{place} can be written to, and locks files")


def clock(scene: Scene) -> Iterator[Seen]:
    """The clock of this machine, and that of the file system, by which runs are named and told apart."""
    now = time.time()
    if now < BUILT.timestamp():
        yield fail(
            f"the clock says {datetime.datetime.fromtimestamp(now, datetime.UTC):%Y-%m-%d}", "timedatectl set-ntp on"
        )
        return
    try:
        with tempfile.NamedTemporaryFile(dir=there(scene.root)) as file:
            apart = file_time(Path(file.name)) - time.time()
    except OSError:
        raise Skipped("skipped, because nothing can be written there") from None
    if abs(apart) > LATE_SECONDS:
        what = f"files in {scene.root.parent} are made {abs(apart):,.0f} s {'ahead' if apart > 0 else 'late'}"
        yield warn(what, "let both machines set their clocks: timedatectl set-ntp on")
    else:
        yield ok(f"{datetime.datetime.fromtimestamp(now, datetime.UTC):%Y-%m-%d %H:%M} UTC, and the disk agrees")


def disk(scene: Scene) -> Iterator[Seen]:
    """What the run will have written by its end, on each file system; and a download before it begins."""
    needs = [(need.what, need.place, need.bytes) for need in scene.disk.made()]
    base = scene.base.given()
    if isinstance(base, RemoteBase):
        needs.append(("the download of the base", Path(base.folder), base.to_download))
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for need in needs:
        disks.setdefault(there(need[1]).stat().st_dev, []).append(need)
    for held in disks.values():
        place, needed = there(held[0][1]), sum(size for _, _, size in held)
        free, largest = free_bytes(place), max(held, key=lambda need: need[2])
        what = f"{place}: {in_bytes(needed)} of {in_bytes(free)} free (most of it {largest[0]})"
        if needed > free:
            fix = "make room, another run.output_dir, a lower checkpoint.keep, or merge.enabled: false"
            yield fail(what, fix)
        else:
            yield ok(what)


def free_bytes(place: Path) -> int:
    return shutil.disk_usage(place).free


def file_time(path: Path) -> float:
    return path.stat().st_mtime


def there(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(each for each in (path, *path.parents) if each.is_dir())
