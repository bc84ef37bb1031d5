"""Criterion E sees what it is to see: the same in two runs, and a difference in every wrong way to go on."""

from pathlib import Path

import pytest

from phased_cpt.errors import PhasedCptError
from tests.faults.conftest import Reference, Runs
from tests.faults.criterion import apart, everything


@pytest.mark.fault("F6", "positive control: the undisturbed run, twice", "exact (E)")
def test_the_reference_equals_itself(runs: Runs, reference: Reference) -> None:
    runs.run()
    assert apart(everything(Path("run")), reference.whole) == []


@pytest.mark.fault("F6", "negative controls: five wrong ways to go on", "seen by E")
@pytest.mark.parametrize(
    "how, where",
    [
        ("a row later", "weights"),
        ("dropout is not seeded", "weights"),
        ("exp_avg is not restored", "weights"),
        ("the learning rate begins anew", "steps"),
    ],
)
def test_a_wrong_way_to_go_on_is_seen(how: str, where: str, runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two")
    runs.run(door=runs.door("goes_on_wrongly", how))
    found = apart(everything(Path("run")), reference.whole)
    assert where in found and "weights" in found


def test_a_moment_that_did_not_come_back_is_noticed_before_a_step_is_trained(runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two")
    with pytest.raises(PhasedCptError, match=r"exp_avg.* did not come back as it was saved"):
        runs.run(door=runs.door("goes_on_wrongly", "exp_avg is not restored, and looked at"))
    runs.run()
    assert apart(everything(Path("run")), reference.whole) == []


def test_a_step_that_is_missing_in_the_log_is_seen(reference: Reference) -> None:
    run = reference.copy("all is done")
    steps = run / "phase2_two/logs/train.jsonl"
    steps.write_text("".join(steps.read_text().splitlines(keepends=True)[:-1]))
    assert apart(everything(run), reference.whole) == ["steps"]
