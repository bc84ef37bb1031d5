"""Killed at the n-th file operation, for every n, and then the same call: criterion E holds each time.

The sweep of a phase begins with the phases before it done, and ends when that phase is: by induction, of the whole run.
"""

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.errors import PhasedCptError
from phased_cpt.run_dir import RunDir
from tests.faults.conftest import Reference, Runs, Told
from tests.faults.criterion import everything, require_equal
from tests.faults.operations import act_at

EVERY = 10_000
WORD = Path("word.jsonl")


def killed_in_a_rank(runs: Runs, phase: int, rank: int, kinds: str, at: int, **wanted: Any) -> str | None:
    """Run until a rank is killed at its n-th operation; which one that was, or None if there is no n-th."""
    WORD.unlink(missing_ok=True)
    place = phase, rank, at, {"kinds": kinds}, str(WORD.resolve())
    try:
        runs.run(door=runs.door("meets", *place), **wanted)
    except PhasedCptError:  # of one that was killed when all was published, nobody complains
        if not WORD.exists():
            raise
    return " of ".join(json.loads(WORD.read_text())) if WORD.exists() else None


def begun(reference: Reference, phase: int) -> None:
    shutil.rmtree("run", ignore_errors=True)
    if phase == 2:
        reference.copy("one is done")


def swept(
    at_each: Iterable[int],
    begin: Callable[[], None],
    kill: Callable[[int], str | None],
    finish: Callable[[int, str], None],
) -> list[str]:
    """Where it was killed, in order, until there was nothing left to kill."""
    places: list[str] = []
    for at in at_each:
        begin()
        if (place := kill(at)) is None:
            break
        places.append(place)
        finish(at, place)
    return places


RANKS = [
    pytest.param(1, 0, "files", range(25, 400, 55), id="phase 1, rank 0, some files"),
    pytest.param(2, 0, "files", range(20, 400, 45), id="phase 2, rank 0, some files"),
    pytest.param(2, 1, "pulses", range(8, 400, 17), id="phase 2, rank 1, some signs of life"),
    pytest.param(1, 0, "files", range(1, EVERY), id="phase 1, rank 0, every file", marks=pytest.mark.heavy),
    pytest.param(2, 0, "files", range(1, EVERY), id="phase 2, rank 0, every file", marks=pytest.mark.heavy),
    pytest.param(2, 1, "files", range(1, EVERY), id="phase 2, rank 1, every file", marks=pytest.mark.heavy),
    pytest.param(1, 0, "pulses", range(1, EVERY), id="phase 1, rank 0, every sign of life", marks=pytest.mark.heavy),
    pytest.param(2, 1, "pulses", range(1, EVERY), id="phase 2, rank 1, every sign of life", marks=pytest.mark.heavy),
]


@pytest.mark.requirement("R-01")
@pytest.mark.fault("F2", "SIGKILL of rank 0 or 1 at each sign of life: loading, each micro batch, evaluating, saving, publishing", "exact (E)")  # fmt: skip
@pytest.mark.fault("F3", "SIGKILL at each file operation of each save", "exact (E)")
@pytest.mark.fault("F4", "SIGKILL at each file operation of beginning and of publishing a phase", "exact (E)")
@pytest.mark.fault("F6", "SIGKILL at the n-th file operation of a rank, for every n", "exact (E)")
@pytest.mark.fault("F11", "SIGKILL of one rank of two, wherever it is", "exact (E)")
@pytest.mark.parametrize("phase, rank, kinds, at_each", RANKS)
def test_a_rank_killed_anywhere_loses_nothing(
    phase: int, rank: int, kinds: str, at_each: range, runs: Runs, reference: Reference, told: Told
) -> None:
    last, wanted = ("one", reference.first_phase) if phase == 1 else (None, reference.whole)
    runs.config["checkpoint"]["keep"] = 1  # so that checkpoints and slots are taken away, too

    def finish(at: int, place: str) -> None:
        runs.run(last=last)
        require_equal(everything(Path("run")), wanted, f"killed at {at}, {place}")

    places = swept(
        at_each,
        lambda: begun(reference, phase),
        lambda at: killed_in_a_rank(runs, phase, rank, kinds, at, last=last),
        finish,
    )
    require_equal(everything(Path("run")), wanted, "not killed any more")
    assert len(places) > 1, "there was something to kill"
    if at_each.step == 1 and rank == 0 and kinds == "files":
        seen = " ".join(places)
        for passage in ("checkpoint-2.building", "/checkpoint-2", "best-3", ".deleting", "published", "best_adapter"):
            assert passage in seen, passage
    told(f"phase {phase}, rank {rank}: SIGKILL at {len(places)} {kinds}, all exact", len(places))


@pytest.mark.fault("F4", "SIGKILL while the random base is written", "exact (E), and half of one is taken away")
def test_half_a_random_base_does_not_stay_behind(runs: Runs, reference: Reference) -> None:
    half = ("open of /.random_base.", "write of /.random_base.")
    places = (killed_in_a_rank(runs, 1, 0, "files", at, last="one") for at in range(8, 40))
    next(place for place in places if place is None or place.startswith(half))
    assert list(Path("run").glob(".random_base.*")), "the control: there is half of one"
    runs.run(last="one")
    require_equal(everything(Path("run")), reference.first_phase, "killed while the base was written")
    assert not list(Path("run").glob(".random_base.*"))


# The conductor ----------------------------------------------------------------------------------------------------------


def killed_in_the_conductor(runs: Runs, at: int) -> str | None:
    """Conduct in a child that is killed before its n-th file operation."""
    WORD.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            act_at(at, RunDir(Path("run").resolve()).root, WORD.resolve())
            runs.run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # whatever happens, the child must not go on as a second pytest
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGKILL if WORD.exists() else 0)
    return " of ".join(json.loads(WORD.read_text())) if WORD.exists() else None


CONDUCTOR = [
    pytest.param(1, range(10, 400, 60), id="some, of a whole run"),
    pytest.param(2, range(25, 400, 25), id="some, of the second phase"),
    pytest.param(1, range(1, EVERY), id="every, of a whole run", marks=pytest.mark.heavy),
]


@pytest.mark.fault("F4", "SIGKILL of the conductor at each of its file operations: ledger, job, handover, final model", "exact (E)")  # fmt: skip
@pytest.mark.fault("F6", "SIGKILL at the n-th file operation of the conductor, for every n", "exact (E)")
@pytest.mark.parametrize("phase, at_each", CONDUCTOR)
def test_a_conductor_killed_anywhere_loses_nothing(
    phase: int, at_each: range, runs: Runs, reference: Reference, told: Told
) -> None:
    def finish(at: int, place: str) -> None:
        runs.run()
        require_equal(everything(Path("run")), reference.whole, f"killed at {at}, {place}")

    places = swept(at_each, lambda: begun(reference, phase), lambda at: killed_in_the_conductor(runs, at), finish)
    require_equal(everything(Path("run")), reference.whole, "not killed any more")
    assert len(places) > 1, "there was something to kill"
    if at_each.step == 1:
        assert all(name in " ".join(places) for name in ("run.json", "job.json", "final_model", "tokenizer"))
    told(f"the conductor, from phase {phase}: SIGKILL at {len(places)} file operations, all exact", len(places))
