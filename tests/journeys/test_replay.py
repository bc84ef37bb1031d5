"""A phase that replays, through real training: what was planned is what is trained, stopped on the way or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.data.prepare import prepare
from phased_cpt.errors import Interrupted, PhasedCptError
from phased_cpt.tables import prepared_facts
from tests.conftest import SAMPLE
from tests.journeys.conftest import Ran, Tiny, lines, planned
from tests.journeys.runs import all_of

KINDS: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 4},
    "tokens and a temperature": {"tokens": 3000, "data": {"temperature": 2}},
}


@pytest.mark.requirement("D-05")
@pytest.mark.parametrize("kind", KINDS)
def test_a_phase_trains_what_it_was_planned_to_replay(tiny: Tiny, ran: Ran, kind: str) -> None:
    config = tiny()
    sources = [str(SAMPLE / "phase2_evolution.jsonl"), str(SAMPLE / "phase3_pr_mastery.jsonl")]
    config["phases"] = [config["phases"][0], {"name": "evolution", "sources": sources, "replay": 0.25, **KINDS[kind]}]
    ran(config)
    facts = prepared_facts(prepare(planned(config)))["phases"][1]
    trained = lines(Path("run/phase2_evolution/logs/train.jsonl"))
    assert trained[-1]["step"] == facts["steps"] == 4
    assert trained[-1]["tokens_seen"] == facts["splits"]["train"]["tokens_trained"]
    (old,) = facts["replay"]
    assert abs(old["share"] - 0.25) < 0.001 and old["phase"] == "foundation"
    assert sum(each["tokens"] for each in [old, *facts["mixture"]]) == trained[-1]["tokens_seen"]
    assert trained[-1]["epoch"] < 1, "its epochs are those of its own documents"
    whole = all_of(Path("run"))
    shutil.rmtree("run")
    with pytest.raises(Interrupted):
        ran(config, steps_today=6)
    ran(config)
    assert all_of(Path("run")) == whole


def test_a_replayed_file_that_changed_is_refused_under_a_phase_that_has_begun(tiny: Tiny, ran: Ran) -> None:
    """Of the phase that trained it, and of the one that replays it."""
    config = tiny()
    shutil.copy(SAMPLE / "phase1_foundation.jsonl", "old.jsonl")
    config["phases"] = [
        {"name": "foundation", "sources": "old.jsonl", "max_steps": 2},
        {"name": "evolution", "sources": str(SAMPLE / "phase2_evolution.jsonl"), "max_steps": 2, "replay": 0.2},
    ]
    ran(config)
    with Path("old.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(PhasedCptError, match=r"sources\.0") as no:
        ran(config)
    assert no.value.exit_code == 4
    fingerprint = json.loads(Path("run/run.json").read_text())["phases"][1]["fingerprint"]
    assert "replay.foundation.0" in json.dumps(fingerprint)
