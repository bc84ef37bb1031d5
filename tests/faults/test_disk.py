"""A full disk is told with its place and what is free; what was sealed stays whole; with room, the same call goes on."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.run_dir import RunDir
from phased_cpt.sealed import CHECKPOINT, fault_of, of_kind
from tests.faults.conftest import Reference, Runs, Told
from tests.faults.criterion import everything, require_equal
from tests.faults.operations import act_at

WORD = Path("word.jsonl")


def require_told(error: BaseException) -> None:
    """Where, that there is no room, and how much is left."""
    text = str(error)
    assert "No space left on device" in text, text
    assert f"{Path('run').resolve()}" in text or "run/" in text, text
    assert " free" in text and "the same command goes on" in text, text


def require_told_somewhere(error: BaseException) -> None:
    """A rank leaves word in a file; where not even that can be written, its log has it."""
    if "No space left on device" in str(error):
        require_told(error)
    else:
        assert "No space left on device" in Path("run/phase2_two/logs/rank0.log").read_text()


def require_whole(folder: Path) -> None:
    """Every checkpoint that has its name is whole."""
    record = json.loads(Path("run/run.json").read_text())
    [fingerprint] = [phase["fingerprint"]["digest"] for phase in record["phases"] if phase["state"] == "running"] or [
        ""
    ]
    for _, checkpoint in of_kind(folder, CHECKPOINT):
        assert fault_of(checkpoint, fingerprint) is None


@pytest.mark.requirement("R-04")
@pytest.mark.fault("F14", "from the n-th write of rank 0 on, every write is refused (ENOSPC)", "place and free space told; what is sealed is whole; with room: exact (E)")  # fmt: skip
@pytest.mark.parametrize("at_each", [range(30, 200, 50), pytest.param(range(1, 400, 3), marks=pytest.mark.heavy)])
def test_a_disk_that_fills_up_loses_nothing(at_each: range, runs: Runs, reference: Reference, told: Told) -> None:
    failed = told_at_once = 0
    for at in at_each:
        reference.copy("one is done")
        WORD.unlink(missing_ok=True)
        place = 2, 0, at, {"action": "stays full"}, str(WORD.resolve())
        try:
            runs.run(door=runs.door("meets", *place))
        except PhasedCptError as error:
            failed += 1
            told_at_once += "No space left on device" in str(error)
            require_told_somewhere(error)
            require_whole(Path("run/phase2_two/checkpoints"))
        if not WORD.exists():
            break
        runs.run()
        require_equal(
            everything(Path("run")), reference.whole, f"full from {at} on: {WORD.read_text().splitlines()[0]}"
        )
    assert failed > 1
    told(f"full from {failed} places on; {told_at_once} told by the message, the others by the log of the rank", failed)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here ({mounted.stderr.strip()})")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.fault("F14", "a real file system (tmpfs) that somebody else fills: before a save, before the best weights, before publishing", "place and free space told; what is sealed is whole; with room: exact (E)")  # fmt: skip
@pytest.mark.parametrize("passage, step", [("_save", 2), ("_keep_best", 2), ("publish", 3)])
def test_a_real_disk_that_is_full(
    passage: str, step: int, disk: Path, runs: Runs, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(disk)
    reference.copy("one is done")
    with pytest.raises(PhasedCptError) as failure:
        runs.run(door=runs.door("fills", str(disk), step, passage))
    require_told(failure.value)
    assert "0.0 MB free" in str(failure.value)
    require_whole(Path("run/phase2_two/checkpoints"))
    Path("filler").unlink()
    runs.run()
    require_equal(everything(Path("run")), reference.whole, passage)


@pytest.mark.fault("F14", "a disk with no room for what will be saved, before the phase begins", "told with what is needed and what is free, before a step")  # fmt: skip
def test_room_is_looked_for_before_the_first_step(disk: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk)
    config = runs.with_(lora={"r": 128, "alpha": 128})
    free = os.statvfs(disk)
    with Path("filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free.f_bavail * free.f_frsize - 5_000_000)
    with pytest.raises(
        PhasedCptError, match=r"3 checkpoints of .* weights.* take .*, and .* are free; make room there"
    ):
        runs.run(config=config, last="one")
    assert not Path("run/phase1_one/logs/train.jsonl").read_text()
    Path("filler").unlink()
    runs.run(config=config, last="one")


@pytest.mark.heavy
@pytest.mark.fault("F14", "from the n-th write of the conductor on, every write is refused (ENOSPC)", "a message, no torn state; with room: exact (E)")  # fmt: skip
def test_a_disk_that_fills_up_under_the_conductor_loses_nothing(runs: Runs, reference: Reference, told: Told) -> None:
    failed = 0
    for at in range(1, 400, 2):
        reference.copy("one is done") if at % 4 == 1 else shutil.rmtree("run", ignore_errors=True)
        if (message := in_a_child(runs, at)) is None:
            break
        assert "No space left on device" in message, (at, message)
        failed += 1
        runs.run()
        require_equal(everything(Path("run")), reference.whole, f"full from {at} on: {message}")
    assert failed > 5
    told(f"full from {failed} places on", failed)


def in_a_child(runs: Runs, at: int) -> str | None:
    """Conduct, with a disk that is full from the n-th operation on; the message of its end."""
    WORD.unlink(missing_ok=True)
    said = Path("said")
    child = os.fork()
    if child == 0:
        try:
            act_at(at, RunDir(Path("run").resolve()).root, WORD.resolve(), action="stays full")
            runs.run()
        except (PhasedCptError, OSError) as error:
            said.write_text(f"{type(error).__name__}: {error}")
        except BaseException as error:
            said.write_text(f"UNEXPECTED {type(error).__name__}: {error}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return said.read_text() if WORD.exists() else None


@pytest.mark.fault("F15", "a run folder on a file system that is mounted read-only", "refused before the data is prepared; made writable: runs")  # fmt: skip
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_made(disk: Path, runs: Runs) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    config = runs.with_(run={"dir": str(disk / "run"), "cache_dir": "cache_of_its_own"})
    with pytest.raises(InputError, match=rf"^{disk}/run: {disk} cannot be written to; name another folder"):
        runs.run(config=config, folder=str(disk / "run"))
    assert not Path("cache_of_its_own").exists()
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    runs.run(config=config, folder=str(disk / "run"), last="one")
