"""Called again, moved, its file times shuffled, or of another version: a run folder is what is in it, and nothing else."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.errors import PhasedCptError
from phased_cpt.ledger.fingerprint import digest_of
from tests.faults.conftest import Reference, Runs, Told
from tests.faults.criterion import apart, digests, everything, require_equal
from tests.faults.test_damage import resumed

OF_A_CALL = {"run.json", "run.lock"}  # which say who has called


class MustNotTrain:
    """A door that stays shut."""

    ranks = 2

    def train(self, job: object, stop: object) -> None:
        raise AssertionError("nothing was to be trained")


@pytest.mark.fault("F22", "called twice more when all is done", "nothing is trained; zero bytes change, but who called when in run.json and run.lock")  # fmt: skip
def test_a_finished_run_that_is_called_again_does_not_change(runs: Runs, reference: Reference, told: Told) -> None:
    run = reference.copy("all is done")
    before = digests(run)
    for _ in range(2):
        assert runs.run(door=MustNotTrain()).finished
    after = digests(run)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= OF_A_CALL
    record = json.loads((run / "run.json").read_text())
    assert record["phases"] == json.loads((reference.folder / "all is done/run.json").read_text())["phases"]
    told(f"{len(before)} files, {len(before) - 2} of them the same bytes after two more calls", 2)


@pytest.mark.fault("F22", "called again when a phase is done", "no step more: exact (E)")
def test_a_finished_phase_is_not_trained_one_step_more(runs: Runs, reference: Reference) -> None:
    run = reference.copy("one is done")
    assert runs.run(door=MustNotTrain(), last="one").trained == ()
    require_equal(everything(run), reference.first_phase, "called again")


@pytest.mark.fault("F23", "every file time of a half-done run drawn at random, before 1971 and after 2100", "the same checkpoint, the same retention: exact (E)")  # fmt: skip
def test_file_times_decide_nothing(runs: Runs, reference: Reference) -> None:
    run, dice = reference.copy("two steps of two"), random.Random(1)
    newest, before = (run / f"phase2_two/checkpoints/checkpoint-{step}" for step in (2, 1))
    for path in run.rglob("*"):
        os.utime(path, (dice.uniform(0, 2**32),) * 2)
    os.utime(before, (2**32,) * 2)
    os.utime(newest, (1,) * 2)
    runs.run()
    assert resumed() == {"two": 2}
    require_equal(everything(run), reference.whole, "with other file times")


@pytest.mark.fault(
    "F29", "the run folder renamed, or copied and the first one deleted, half-done and done", "exact (E)"
)
def test_a_run_that_has_moved_goes_on(runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two", "here")
    shutil.copytree("here", "far/away/there")
    shutil.rmtree("here")
    moved = runs.with_(run={"dir": "far/away/there"})
    runs.run(config=moved, folder="far/away/there")
    require_equal(everything(Path("far/away/there")), reference.whole, "moved half-done")
    os.rename("far/away/there", "back")
    assert runs.run(config=runs.with_(run={"dir": "back"}), folder="back", door=MustNotTrain()).finished
    require_equal(everything(Path("back")), reference.whole, "moved when done")


# Another version --------------------------------------------------------------------------------------------------------

MADE = Path(__file__).parent / "made_by_0_1"  # half-done; without what a call writes anew: base, tokenizer


def made_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MADE / "config.json").read_text())
    config["phases"][0]["sources"] = str(MADE / "documents.jsonl")
    config["model"]["tokenizer"] = str(MADE.parents[2] / "dataset/sample/tokenizer.json")
    return config | {"run": config["run"] | {"dir": str(folder), "cache_dir": "cache"}}


@pytest.mark.fault("F30", "a half-done run folder that phased_cpt 0.1 (format 1) has made, stored with the tests", "goes on, or is refused with the difference; never begins anew unsaid")  # fmt: skip
def test_a_run_folder_of_format_1_is_read(runs: Runs, told: Told) -> None:
    shutil.copytree(MADE / "run", "run")
    config = made_config(Path("run"))
    assert runs.run(config=config).finished
    assert resumed() == {"one": 1}
    steps = [json.loads(line)["step"] for line in Path("run/phase1_one/logs/train.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    told("format 1: went on after step 1, to the end")


@pytest.mark.fault("F30", "a run.json of a newer format", "refused, nothing touched")
def test_a_record_of_a_newer_version_is_refused(runs: Runs, reference: Reference) -> None:
    run = reference.copy("two steps of two")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"format": 99}))
    before = digests(run)
    with pytest.raises(PhasedCptError, match=r"written by a newer phased_cpt \(format 99\); upgrade"):
        runs.run(door=MustNotTrain())
    assert digests(run) == before
    (run / "run.json").write_text(json.dumps(record))
    runs.run()
    assert apart(everything(run), reference.whole) == []


@pytest.mark.fault("F30", "a checkpoint of a newer format", "refused, not set aside; exact (E) when it is read again")
def test_a_checkpoint_of_a_newer_version_is_refused_and_stays(runs: Runs, reference: Reference) -> None:
    run = reference.copy("two steps of two")
    path = run / "phase2_two/checkpoints/checkpoint-2/manifest.json"
    manifest = path.read_text()
    values = {key: value for key, value in json.loads(manifest).items() if key != "digest"} | {"format": 99}
    path.write_text(json.dumps(values | {"digest": digest_of(values)}))
    with pytest.raises(PhasedCptError, match=r"checkpoint-2: made by a newer phased_cpt \(format 99\); upgrade"):
        runs.run(door=MustNotTrain())
    path.write_text(manifest)
    runs.run()
    assert resumed() == {"two": 2}
    require_equal(everything(run), reference.whole, "read again")
