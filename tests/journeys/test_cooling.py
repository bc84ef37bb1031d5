"""Out of patience at a high rate, a phase cools down before it stops; killed on the way, it goes on with that."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.schedule import Cooling, Schedule
from tests.journeys.conftest import Ran, Tiny
from tests.journeys.runs import all_of
from tests.journeys.test_publishing import RISING, source
from tests.journeys.test_resume import to_the_end

RUN = Path("run")


def impatient(tiny: Tiny, cooldown_ratio: float) -> dict[str, Any]:
    """A rate at which the held-out loss soon rises, and stays high."""
    sections: dict[str, Any] = {**RISING, "training": {**RISING["training"], "min_lr_ratio": 0.01}}
    sections["evaluation"] = {"every_steps": 1, "patience": 2, "cooldown_ratio": cooldown_ratio}
    config = tiny(**sections, data={"eval_max_tokens": 500}, checkpoint={"every_steps": 1})
    return config | {"phases": [{**config["phases"][0], "max_steps": 40}]}


def rates() -> list[float]:
    return [line["learning_rate"] for line in all_of(RUN)["steps"]["phase1_foundation"]]


@pytest.mark.requirement("T-09", "R-02")
def test_a_phase_out_of_patience_cools_down_and_one_that_is_stopped_on_the_way_does_too(tiny: Tiny, ran: Ran) -> None:
    config = impatient(tiny, 0.1)
    ran(config)
    at_once, said, trace = all_of(RUN), source("phase1_foundation"), rates()
    begin = len(trace) - 10
    schedule = Schedule("constant", 0.5, 40, warmup_steps=1, min_ratio=0.01)
    expected = [schedule.rate(done, Cooling(begin, 10)) for done in range(len(trace))]
    assert trace == pytest.approx(expected, rel=1e-12)
    assert trace[begin] == 0.5 > trace[-1] > schedule.floor, "the last step still learns"
    measured = [line["step"] for line in at_once["evaluations"]["phase1_foundation"]]
    assert max(measured) == said["steps"] == begin + 10 < 40, "it is measured where it ends"
    best = min(at_once["evaluations"]["phase1_foundation"][1:], key=lambda line: line["eval_loss"])
    assert said["step"] == best["step"], "the best of all its weights, as ever"
    log = (RUN / "logs/training.log").read_text()
    assert "the learning rate falls from 0.5 to 0.005, and it stops at step" in log
    assert f"stopped at step {begin + 10}, its learning rate cooled down" in log
    shutil.rmtree(RUN)
    assert to_the_end(ran, config, begin + 4) == 1, "within the cool-down"
    state = json.loads(json.dumps(all_of(RUN)))
    assert state == json.loads(json.dumps(at_once))
    assert "cooling down)" in (RUN / "logs/training.log").read_text()


def test_the_old_way_stops_at_once_at_the_rate_that_it_has(tiny: Tiny, ran: Ran) -> None:
    """The negative control: cut off at the peak."""
    ran(impatient(tiny, 0))
    assert set(rates()[1:]) == {0.5}
    assert source("phase1_foundation")["steps"] == len(rates()) < 30
