"""Found on a second reading: what a gate has changed, what is free under a run, what may be lost and made again."""

import json
import shutil
from pathlib import Path

import pytest

from phased_cpt.errors import PhasedCptError
from phased_cpt.ledger import amended, read_record, reconcile
from phased_cpt.run_dir import RunDir
from tests.conftest import SAMPLE, Call
from tests.journeys.conftest import Ran, Tiny, planned
from tests.journeys.test_failures import second_door
from tests.journeys.test_gates import IMPOSSIBLE, gated, second_phase
from tests.journeys.test_handovers import chain, records
from tests.journeys.test_merge import merged_quickly  # noqa: F401 - a fixture
from tests.zygote import Zygote

RUN = Path("run")


def test_a_phase_that_a_gate_has_retried_can_be_looked_at_and_redone(tiny: Tiny, ran: Ran) -> None:
    """Redone it begins without the replay that only its gate had asked for; and the same command finds it done."""
    again = {**IMPOSSIBLE, "on_fail": "retry_with_replay", "replay": 0.25}
    with pytest.raises(PhasedCptError, match="not published"):
        ran(gated(tiny, again))
    easy = gated(tiny, {**again, "min_gain": -5.0})
    ran(easy)
    record, plan = read_record(RunDir(RUN)), planned(easy)
    assert record is not None
    reconcile(record, amended(plan, record), None, 9)  # as --dry-run and preflight do
    assert ran(easy, redo_from="evolution").trained == ("evolution",)
    assert (second_phase().replay_by_gate, second_phase().fingerprint.parts["replay"]) == (None, None)  # type: ignore[union-attr]
    assert ran(easy).trained == ()


def test_a_general_set_that_shares_a_document_with_what_is_trained_is_told(
    tiny: Tiny, call: Call, tmp_path: Path
) -> None:
    leaking = {"general": {"leak": str(SAMPLE / "phase1_foundation.jsonl")}}
    (tmp_path / "run.json").write_text(json.dumps(tiny(evaluation={"every_steps": 2, **leaking})))
    answer = call("prepare", "-c", "run.json")
    assert answer.code == 0, answer.err
    assert "documents of leak (eval) are in foundation (train), too" in " ".join(answer.out.split())
    missing = ("--set", "evaluation.general={gone: gone.jsonl}")
    assert "evaluation.general.gone: gone.jsonl" in call("prepare", "-c", "run.json", *missing).err


@pytest.mark.usefixtures("merged_quickly")
def test_a_merged_base_is_the_same_whatever_is_free_has_changed(tiny: Tiny, ran: Ran) -> None:
    """The size of the shards of the model at the end is free; and half of a base is none."""
    config = chain(tiny, "merge")
    config["phases"] = config["phases"][:2]
    ran(config)
    before = records()["evolution"].published
    base = RUN / "phase1_foundation" / "merged_base"
    next(base.glob("*.safetensors")).unlink()  # a kill while it was removed
    config["merge"] = {"enabled": False, "max_shard_size": 200_000}
    assert ran(config, redo_from="evolution").trained == ("evolution",)
    assert records()["evolution"].published == before
    assert len(list(base.glob("*.safetensors"))) == 1, "the control: 200 kB would be many"


def test_a_set_that_has_other_rows_now_is_another_set(tiny: Tiny, ran: Ran) -> None:
    """Before a phase has begun its sources may change; what was measured of the old ones stands beside nothing."""
    config = tiny()
    ran(config, last="foundation")
    config["phases"][1]["sources"] = str(SAMPLE / "phase3_pr_mastery.jsonl")
    config["phases"] = config["phases"][:2]
    ran(config)
    found = json.loads((RUN / "forgetting.json").read_bytes())
    column = {row["after"]: row["losses"]["evolution"] for row in found["rows"]}
    assert column[None] is None and column["foundation"] is None and column["evolution"] is not None
    assert found["measures"]["sets"]["evolution"]["forward_transfer"] is None
    kept = [row["losses"]["foundation"] for row in found["rows"]]
    assert all(kept), "the control: what has not changed is there"


def test_a_control_leaves_no_checkpoints_and_a_finished_run_is_finished_before_it(tiny: Tiny, ran: Ran) -> None:
    config = tiny(checkpoint={"every_steps": 2})
    config["phases"] = config["phases"][:2]
    ran(config, control=True)
    assert (RUN / "final_model").exists()
    assert (RUN / "control/phase2_evolution/best_adapter").exists()
    assert not list((RUN / "control").rglob("checkpoint-*"))
    shutil.rmtree(RUN / "control")
    weights = RUN / "phase1_foundation/best_adapter/adapter_model.safetensors"
    spoilt = bytearray(weights.read_bytes())
    spoilt[-2] ^= 0x40
    weights.write_bytes(bytes(spoilt))
    with pytest.raises(PhasedCptError, match="not what was published"):
        ran(config, control=True)


def test_a_gate_and_a_control_work_through_the_second_door(tiny: Tiny, zygote: Zygote) -> None:
    """The other ranks end with a closed gate; the same command trains the phase again, as the ledger has it."""
    config = gated(tiny, {"min_gain": 5.0, "on_fail": "retry_with_replay", "replay": 0.25})
    first = second_door(zygote, config)
    assert first.codes[0] == 75, first.out
    assert "trained again with 25.0% of the earlier phases" in first.out[0]
    again = second_door(zygote, config)
    assert again.codes[0] == 6, again.out
    assert second_phase().replay_by_gate == 0.25
    config["phases"][1]["gate"]["min_gain"] = -5.0
    last = second_door(zygote, config)
    assert last.codes == [0, 0], last.out
    assert json.loads((RUN / "forgetting.json").read_bytes())["controls"] == {}
    controlled = second_door(zygote, config, "--control")
    assert controlled.codes == [0, 0], controlled.out
    assert list(json.loads((RUN / "forgetting.json").read_bytes())["controls"]) == ["evolution"]
