"""What a phase must hold to be published."""

import json
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.errors import GateClosed, PhasedCptError
from phased_cpt.ledger import PhaseRecord, read_record
from phased_cpt.run_dir import RunDir
from tests.journeys.conftest import Ran, Tiny

IMPOSSIBLE, EASY = {"min_gain": 5.0}, {"min_gain": -1.0, "max_forgetting": 10.0}
EVOLUTION = Path("run/phase2_evolution")


def gated(tiny: Tiny, gate: dict[str, Any]) -> dict[str, Any]:
    config = tiny(training={"learning_rate": 0.01})
    first, second, _ = config["phases"]
    return config | {"phases": [first, second | {"gate": gate}]}


def second_phase() -> PhaseRecord:
    record = read_record(RunDir(Path("run")))
    assert record is not None
    return record.phases[1]


def test_a_gate_that_closes_stops_the_run_with_a_code_of_its_own(tiny: Tiny, ran: Ran) -> None:
    with pytest.raises(
        PhasedCptError, match=r"evolution is trained and not published: its own held-out loss fell by"
    ) as e:
        ran(gated(tiny, IMPOSSIBLE))
    assert e.value.exit_code == GateClosed.exit_code == 6
    assert not (EVOLUTION / "best_adapter").exists()
    phase = second_phase()
    assert (phase.state, phase.gate and phase.gate["passed"]) == ("running", False)
    with pytest.raises(PhasedCptError, match="not published"):
        ran(gated(tiny, IMPOSSIBLE))  # the same command comes to the same end
    assert ran(gated(tiny, {**IMPOSSIBLE, "on_fail": "warn"})).finished, "a gate is no recipe: it may be opened"
    phase = second_phase()
    assert (phase.state, phase.gate and phase.gate["passed"]) == ("done", False), "and the ledger does not hide it"
    assert "the gate would not let it pass" in Path("run/logs/training.log").read_text()


def test_a_gate_that_opens_leaves_its_verdict_in_the_ledger(tiny: Tiny, ran: Ran) -> None:
    assert ran(gated(tiny, EASY)).finished
    gate = second_phase().gate
    assert gate is not None and gate["passed"] and gate["worst"] == "foundation"
    rows = [json.loads((Path("run") / name / "best_adapter/source.json").read_bytes()) for name in (
        "phase1_foundation", "phase2_evolution")]  # fmt: skip
    earlier = [rows[0]["row_before"], rows[0]["row"]]
    best = min(row["foundation"]["eval_loss"] for row in earlier)
    assert gate["forgetting"] == pytest.approx(rows[1]["row"]["foundation"]["eval_loss"] - best, abs=1e-9)
    assert gate["gain"] == pytest.approx(rows[1]["start"]["eval_loss"] - rows[1]["end"]["eval_loss"], abs=1e-9)


def test_a_phase_that_forgets_is_trained_once_more_with_replay(tiny: Tiny, ran: Ran) -> None:
    """What the first try has made is in the archive; a second failure is the end."""
    again = {**IMPOSSIBLE, "on_fail": "retry_with_replay", "replay": 0.25}
    with pytest.raises(PhasedCptError, match="not published") as e:
        ran(gated(tiny, again))
    assert e.value.exit_code == 6
    phase = second_phase()
    assert phase.replay_by_gate == 0.25
    assert phase.fingerprint is not None and phase.fingerprint.parts["replay"] == 0.25
    first, second = Path("run/archive/1/phase2_evolution"), EVOLUTION
    assert (first / "gate.json").exists() and (second / "gate.json").exists()
    before, after = (json.loads((folder / "gate.json").read_bytes())["forgetting"] for folder in (first, second))
    assert after != before, "the control: it was trained on something else"
    assert ran(gated(tiny, {**again, "min_gain": -5.0})).finished, "the replay stays with the phase"
    assert second_phase().fingerprint.parts["replay"] == 0.25  # type: ignore[union-attr]
    assert ran(gated(tiny, {**again, "min_gain": -5.0})).trained == ()
