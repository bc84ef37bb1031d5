"""Killed at any of its file operations, a merge leaves a whole model or none; and the same call goes on with it."""

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from phased_cpt import merging
from phased_cpt.data.watch import Unwatched
from phased_cpt.errors import PhasedCptError
from phased_cpt.merge.story import merge as merge_here
from phased_cpt.merging import MergeJob, merge
from phased_cpt.model.tensor_file import TensorFile
from tests.faults.criterion import sha256
from tests.faults.operations import Action, act_at
from tests.merge.conftest import Making
from tests.merge.kinds import Made, job, marker, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EVERY = 400
WORD = Path("word.jsonl")
SHARD = 30_000  # bytes: five files


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In this process instead of a child of it: what is forked is a whole merge."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(merging, "_run", lambda job: merge_here(job, Unwatched()))


@pytest.fixture
def it(made: Making, tmp_path: Path) -> Made:
    made("plain")
    return made("plain")


@pytest.fixture
def asked(it: Made, tmp_path: Path) -> MergeJob:
    return job(it.base, it.adapter, tmp_path / "run/merged_model", shard=SHARD)


@pytest.fixture
def before(it: Made, tmp_path: Path) -> MergeJob:
    """The same place, and another adapter."""
    other = write_adapter(tmp_path / "other", it.base, 2, target_modules=["o_proj"])
    return job(it.base, other, tmp_path / "run/merged_model", shard=SHARD)


def stopped_at(at: int, asked: MergeJob, action: Action = "kill") -> str | None:
    """Merge in a child that is stopped before its n-th file operation; which one that was, or None without one."""
    WORD.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open("child.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
            _opened_by_python()
            act_at(at, Path("run").resolve(), WORD.resolve(), action=action)
            merge(asked)
            code = 0
        except (PhasedCptError, OSError):
            code = 3
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # whatever happens, the child must not go on as a second pytest
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    stopped = -signal.SIGKILL if action == "kill" else 3
    assert code in ((stopped, 0) if WORD.exists() else (0,)), f"{code}: {Path('child.log').read_text()[-2000:]}"
    return " of ".join(json.loads(WORD.read_text().splitlines()[0])) if WORD.exists() else None


def _opened_by_python() -> None:
    """TensorFile writes without a buffer, through nothing that is counted: each of its writes is one of os.write."""

    def write(self: TensorFile, content: Any) -> None:
        self._hash.update(content)
        self._at += len(content)
        while content:
            content = content[os.write(self._file.fileno(), content) :]

    TensorFile._write = write  # type: ignore[method-assign]


def digests(folder: Path) -> dict[str, str]:
    """All files but for what the clock has said."""
    found = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    facts = marker(folder)
    facts.pop("seconds")
    return found | {"merge.json": json.dumps(facts)}


def inodes(folder: Path, *patterns: str) -> dict[str, tuple[int, int]]:
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def finished(building: Path) -> dict[str, tuple[int, int]]:
    """Files of an unfinished merge that have their note, and what shows if they are written again."""
    notes = (path.name.removesuffix(".done") for path in building.glob("*.done"))
    return inodes(building / "model", *notes)


def whole(folder: Path, known: list[dict[str, str]]) -> None:
    assert not folder.exists() or digests(folder) in known, "neither absent nor whole"


def everything(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


@pytest.fixture
def wanted(asked: MergeJob, before: MergeJob) -> dict[str, Any]:
    """What an undisturbed merge makes, of each job."""
    found: dict[str, Any] = {}
    for name, each in (("old", before), ("new", asked)):
        merge(each)
        found[name] = digests(Path(each.output))
        found[f"{name} tree"] = everything(Path("run"))
        shutil.rmtree("run")
    assert found["old"] != found["new"] and len(found["new"]) > 8
    return found


def operations(asked: MergeJob) -> list[str]:
    """All that an undisturbed merge does."""
    stopped_at(0, asked, "list")
    shutil.rmtree("run")
    return [" of ".join(json.loads(line)) for line in WORD.read_text().splitlines()]


def unlike(places: list[str]) -> Iterator[int]:
    """The numbers of all operations, but for those between the same ones: the many writes of a file."""
    for at, (before, place, behind) in enumerate(zip(["", *places], places, [*places[1:], ""], strict=False), 1):
        if not before == place == behind:
            yield at


def each_stop(
    begin: Callable[[], object], asked: MergeJob, at_each: Iterable[int], action: Action = "kill"
) -> Iterator[tuple[int, str]]:
    """Stopped there, and there, from the same beginning each time; until there is nothing left to stop."""
    for at in at_each:
        shutil.rmtree("run", ignore_errors=True)
        Path("run").mkdir()
        begin()
        if (place := stopped_at(at, asked, action)) is None:
            return
        yield at, place


@pytest.mark.requirement("M-04")
@pytest.mark.fault(
    "F5", "SIGKILL at each file operation of a merge", "absent or whole; gone on with, to the same bytes"
)
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.heavy)])
def test_killed_anywhere_it_is_absent_or_whole_and_goes_on(
    step: int, asked: MergeJob, wanted: dict[str, Any], told: Callable[..., None]
) -> None:
    output, places, kept = Path(asked.output), [], 0
    building = output.with_name(".merged_model.building")
    every = operations(asked)
    for at, place in each_stop(lambda: None, asked, [*unlike(every)][::step]):
        places.append(place)
        whole(output, [wanted["new"]])
        there, was_there = finished(building), output.exists()
        assert merge(asked).now is not was_there
        assert digests(output) == wanted["new"], place
        assert everything(Path("run")) == wanted["new tree"], place
        assert inodes(output, *there) == there, f"{at}, {place}: finished files were written again"
        kept = max(kept, len(there))
        untouched = inodes(output, "*")
        assert not merge(asked).now
        assert inodes(output, "*") == untouched, "a third call does nothing"
    assert kept >= 4, "the control: there were files to keep"
    seen = " ".join(places if step == 1 else every)
    for passage in ("write of", ".part", ".done", "config.json", "README.md", "merge.json", "os.rename"):
        assert passage in seen, passage
    told(f"SIGKILL at {len(places)} file operations, all to the same bytes", len(places))


@dataclass(frozen=True)
class Seen:
    """Over an older merged model, killed before an operation."""

    place: str
    left: str | None  # which one was there
    tree: list[str]  # after the same call


@pytest.fixture(scope="module")
def sweep() -> dict[str, list[Seen]]:
    """Of all tests that look at it, once."""
    return {}


@pytest.fixture
def over_an_older_one(
    asked: MergeJob, before: MergeJob, wanted: dict[str, Any], sweep: dict[str, list[Seen]]
) -> list[Seen]:
    """Here and there while it is made, and at each operation while it takes the place of the other."""
    if sweep:
        return sweep["all"]
    output, found = Path(asked.output), []
    merge(before)
    shutil.move("run", "old")
    shutil.copytree("old", "run")
    count = len(operations(asked))
    begin = partial(shutil.copytree, "old/merged_model", "run/merged_model")
    for at, place in each_stop(begin, asked, chain(range(1, count - 40, 12), range(count - 40, EVERY, 2))):
        whole(output, [wanted["old"], wanted["new"]])
        left = None if not output.exists() else "new" if digests(output) == wanted["new"] else "old"
        merge(asked)
        assert digests(output) == wanted["new"], f"{at}, {place}"
        found.append(Seen(place, left, everything(Path("run"))))
    return sweep.setdefault("all", found)


@pytest.mark.requirement("M-04")
@pytest.mark.fault("F5", "SIGKILL of a merge over an older one", "the old, none or the new, whole; the new one after the same call")  # fmt: skip
def test_killed_over_an_older_one_it_is_there_after_the_same_call(over_an_older_one: list[Seen]) -> None:
    """That each is whole, and what the same call makes of it, the sweep has looked at."""
    order = [each.left for each in over_an_older_one]
    assert order == sorted(order, key=["old", None, "new"].index) and order[0] == "old"


def test_between_the_old_one_and_the_new_one_is_one_rename(
    over_an_older_one: list[Seen], wanted: dict[str, Any]
) -> None:
    absent = [each.place for each in over_an_older_one if each.left is None]
    assert len(absent) <= 1, absent


def test_nothing_is_left_of_an_older_one(over_an_older_one: list[Seen], wanted: dict[str, Any]) -> None:
    left = [each.place for each in over_an_older_one if each.tree != wanted["new tree"]]
    assert not left


@pytest.mark.fault("F5", "SIGKILL after the checks, while it is published", "no file is written again")
def test_killed_after_it_was_checked_it_is_not_merged_again(asked: MergeJob, wanted: dict[str, Any]) -> None:
    output, building = Path(asked.output), Path(asked.output).with_name(".merged_model.building")
    count, late = len(operations(asked)), 0
    for at, place in each_stop(lambda: None, asked, range(count - 20, EVERY)):  # threads: a few more or fewer each time
        if not output.exists() and (building / "model/README.md").exists():
            there = inodes(building / "model", "*.safetensors")
            merge(asked)
            assert inodes(output, "*.safetensors") == there, f"{at}, {place}"
            late += 1
    assert late > 3


@pytest.mark.fault(
    "F14", "ENOSPC at each file operation of a merge", "absent or whole; gone on with, to the same bytes"
)
@pytest.mark.parametrize("action", ["full once", "stays full"])
def test_a_full_disk_is_no_merged_model_and_goes_on(
    action: Action, asked: MergeJob, wanted: dict[str, Any], told: Callable[..., None]
) -> None:
    output, count = Path(asked.output), 0
    for at, place in each_stop(lambda: None, asked, range(1, EVERY, 7), action):
        count += 1
        whole(output, [wanted["new"]])
        merge(asked)
        assert digests(output) == wanted["new"], f"{at}, {place}"
    told(f"ENOSPC at {count} file operations of a merge", count)


def test_what_was_made_of_another_job_is_not_gone_on_with(asked: MergeJob, before: MergeJob, wanted: dict[str, Any]) -> None:  # fmt: skip
    output = Path(asked.output)
    building = output.with_name(".merged_model.building")
    next(None for _ in each_stop(lambda: None, before, range(30, EVERY)) if len(finished(building)) > 2)
    merge(asked)
    assert digests(output) == wanted["new"]
    moved = replace(asked, output=str(output.with_name("elsewhere")), lineage={"run": "another"})
    merge(moved)
    assert marker(Path(moved.output))["digest"] == marker(output)["digest"]


def test_two_at_once_into_one_place_do_not_meet(asked: MergeJob, wanted: dict[str, Any]) -> None:
    """The second is told, or waits: what the first has open must not be taken from it."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open("child.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
            merging._run = lambda job: merge_here(job, Slow(reads)) and None
            merge(asked)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    building = Path(asked.output).with_name(".merged_model.building")
    deadline = time.monotonic() + 20
    while not list(building.rglob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    try:
        with pytest.raises(PhasedCptError):
            merge(asked)
    finally:
        os.write(writes, b"on")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, Path("child.log").read_text()[-2000:]
    assert digests(Path(asked.output)) == wanted["new"]


@dataclass
class Slow(Unwatched):
    """After the first bytes it waits for a word."""

    until: int
    waited: bool = False

    def advance(self, count: int) -> None:
        if count and not self.waited:
            self.waited = bool(os.read(self.until, 1))
