"""Killed again and again, and what is tried again by itself: progress where a save lies between, and an end."""

import json
import random
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from phased_cpt import conducting
from phased_cpt.errors import Diverged, Interrupted, PhasedCptError
from phased_cpt.ledger import read_record
from phased_cpt.run_dir import RunDir
from tests.faults.conftest import Config, Reference, Runs, Told
from tests.faults.criterion import everything, require_equal

SEED = 20_261_120


def long(runs: Runs, steps: int) -> Config:
    """So many steps a phase, and the checkpoints stay, so that the optimizer can be compared: E4."""
    config = runs.with_(checkpoint={"every_steps": 2, "keep": 2, "keep_published": True})
    return config | {"phases": [phase | {"max_steps": steps} for phase in config["phases"]]}


def consumed(name: str) -> dict[tuple[str, int, int], set[str]]:
    """E3: the rows of every micro batch of every step, by their hashes, of all attempts."""
    found = defaultdict(set)
    for path in Path().glob(f"{name}-*.jsonl"):
        for phase, step, place, rows in map(json.loads, path.read_text().splitlines()):
            found[phase, step, place].add(rows)
    return dict(found)


def newest_sealed(steps: int) -> int:
    """Counted over both phases; whatever is published counts as all of its steps."""
    done = steps * len(list(Path("run").glob("*/best_adapter")))
    under_way = [path for path in Path("run").glob("*/checkpoints/checkpoint-*") if not (path.parents[1] / "best_adapter").exists()]  # fmt: skip
    return done + max((int(path.name.rpartition("-")[2]) for path in under_way), default=0)


def standing(steps: int) -> int:
    """Where the last call went on."""
    record = read_record(RunDir(Path("run")))
    assert record is not None
    phase = next((phase.name for phase in record.phases if phase.state != "done"), "two")
    return steps * sum(each.state == "done" for each in record.phases) + record.attempts[-1].resumed.get(phase, 0)


@pytest.mark.requirement("R-01")
@pytest.mark.fault("F7", "SIGKILL of all ranks at random moments, seeded; rows hashed, checkpoints kept", "exact (E, with E3 and E4)")  # fmt: skip
@pytest.mark.parametrize("kills, steps", [(3, 4), pytest.param(10, 12, marks=pytest.mark.heavy)])
def test_killed_at_random_again_and_again(kills: int, steps: int, runs: Runs, told: Told) -> None:
    config, dice = long(runs, steps), random.Random(SEED + kills)
    moments: list[tuple[int, float]] = []
    runs.run(config=config, door=runs.door("dies_later", 0, 0, str(Path("undisturbed").resolve())))
    wanted = everything(Path("run"))
    assert len(wanted["moments"]) == (2 if steps == 4 else 4), "checkpoints of each phase: E4"
    shutil.rmtree("run")
    for _ in range(20 * kills):
        sealed, left = newest_sealed(steps), len(moments) < kills
        moment = dice.randint(1, 4 if kills == 3 else 5) if left else 0, round(dice.uniform(0, 0.1), 3)
        try:
            runs.run(config=config, door=runs.door("dies_later", *moment, str(Path("disturbed").resolve())))
            break
        except PhasedCptError as error:
            assert not isinstance(error, Interrupted)
            moments.append(moment)
            assert standing(steps) >= sealed, "what was sealed is not done again"
    found = everything(Path("run"))
    require_equal(found, wanted, f"killed after {moments}")
    both = consumed("undisturbed"), consumed("disturbed")
    assert all(len(rows) == 1 for rows in both[1].values()), "a step that is done again has the same rows"
    assert both[0] == both[1]
    assert len(moments) == kills
    when = ", ".join(f"{batches} + {seconds} s" for batches, seconds in moments)
    told(f"seed {SEED + kills}, SIGKILL after so many micro batches and seconds: {when}; exact", kills)


# Tried again by itself --------------------------------------------------------------------------------------------------


def tries(runs: Runs) -> int:
    return sum(word.startswith("phase 2/2 two: ") for word in runs.heard.words)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conducting.BACK_OFF_SECONDS > 1
    monkeypatch.setattr(conducting, "BACK_OFF_SECONDS", 0.0)


@pytest.mark.fault("F28", "a step that is always killed, 50 retries allowed", "one retry, for there was progress before it, and none after; fails")  # fmt: skip
def test_what_fails_always_is_not_tried_for_ever(runs: Runs, reference: Reference, told: Told) -> None:
    reference.copy("one is done")
    with pytest.raises(PhasedCptError, match=r"SIGKILL|is gone|rank") as failure:
        runs.run(config=runs.with_(launch={"retries": 50}), door=runs.door("fails_at", 2))
    assert failure.value.exit_code == 1
    assert tries(runs) == 2
    runs.run()
    require_equal(everything(Path("run")), reference.whole, "after what fails always")
    told("50 retries allowed: 2 jobs, then exit 1; mended, the same command is exact")


@pytest.mark.fault("F28", "killed after each save", "tried again as often as allowed: bounded, or exact (E)")
@pytest.mark.parametrize("retries, jobs", [pytest.param(0, 1, marks=pytest.mark.heavy), (1, 2), (2, 3)])
def test_what_makes_progress_is_tried_again_as_often_as_is_allowed(
    retries: int, jobs: int, runs: Runs, reference: Reference
) -> None:
    reference.copy("one is done")
    config, door = runs.with_(launch={"retries": retries}), runs.door("fails_after_each_save")
    if retries < 2:
        with pytest.raises(PhasedCptError) as failure:
            runs.run(config=config, door=door)
        assert failure.value.exit_code == 1
        assert tries(runs) == jobs
    runs.run(config=config, door=door if retries == 2 else None)
    require_equal(everything(Path("run")), reference.whole, f"with {retries} retries")


@pytest.mark.fault("F24", "a loss that is no number, with retries allowed", "exit 5, not tried again; the last good checkpoint goes on: exact (E)")  # fmt: skip
def test_numbers_that_are_none_are_not_tried_again(runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two")
    with pytest.raises(PhasedCptError, match="step 3: the loss is not finite") as failure:
        runs.run(config=runs.with_(launch={"retries": 5}), door=runs.door("no_number"))
    assert failure.value.exit_code == Diverged.exit_code
    assert tries(runs) == 1
    runs.run()
    require_equal(everything(Path("run")), reference.whole, "after numbers that were none")
