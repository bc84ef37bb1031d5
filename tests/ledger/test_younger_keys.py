"""A run that an older version has begun, which had fewer keys: it goes on, for it did what their defaults say."""

import pytest

from phased_cpt.errors import LedgerRefuses
from phased_cpt.ledger import Ledger, read_record
from phased_cpt.ledger.fingerprint import digest_of
from phased_cpt.run_dir import RunDir
from tests.ledger.test_book import MakePlan, begin_all, here, inputs, plan  # noqa: F401 - fixtures

YOUNG = ("lora.use_rslora", "lora.use_dora", "lora.init", "training.lora_plus_ratio", "evaluation.best_of")


def made_older(run_dir: RunDir) -> str:
    """The record as a version would have written it that knew nothing of these keys; returns its fingerprint."""
    record = read_record(run_dir)
    assert record is not None
    first, *later = record.phases
    assert first.fingerprint is not None and set(YOUNG) <= first.fingerprint.parts.keys()
    parts = {key: value for key, value in first.fingerprint.parts.items() if key not in YOUNG}
    older = first.fingerprint.model_copy(update={"parts": parts, "digest": digest_of(parts)})
    phases = (first.model_copy(update={"fingerprint": older}), *later)
    run_dir.ledger.write_text(record.model_copy(update={"phases": phases}).model_dump_json())
    return older.digest


@pytest.fixture
def begun(plan: MakePlan, here: RunDir) -> str:  # noqa: F811
    begin_all(Ledger.open(here, plan()), plan(), until="foundation")
    return made_older(here)


def test_a_phase_goes_on_under_the_name_that_it_was_begun_by(plan: MakePlan, here: RunDir, begun: str) -> None:  # noqa: F811
    """What it has made is named by that: checkpoints with another fingerprint would be set aside."""
    ledger, phase = Ledger.open(here, plan()), plan().phases[0]
    ledger.begin(phase, inputs())
    assert ledger.fingerprint(phase) == begun


@pytest.mark.parametrize("override", ["lora.use_dora=true", "lora.init=gaussian", "training.lora_plus_ratio=16"])
def test_a_young_key_that_is_set_is_another_recipe(
    plan: MakePlan,  # noqa: F811
    here: RunDir,  # noqa: F811
    begun: str,
    override: str,
) -> None:
    key = override.partition("=")[0]
    with pytest.raises(LedgerRefuses, match=f"{key}: was "):
        Ledger.open(here, plan(override))


def test_an_old_key_is_held_to_what_was_written(plan: MakePlan, here: RunDir, begun: str) -> None:  # noqa: F811
    with pytest.raises(LedgerRefuses, match=r"lora\.r: was 128, is 64"):
        Ledger.open(here, plan("lora.r=64"))


def test_a_phase_behind_infinite_is_refused_with_the_way_out(plan: MakePlan, here: RunDir) -> None:  # noqa: F811
    """The last steps of the one before have gone down already."""
    text = (
        "model: {name: m}\nlaunch: {num_gpus: 2}\ntraining: {lr_scheduler: infinite}\nphases: [{name: a, sources: x}%s]"
    )
    alone, behind = text % "", text % ", {name: b, sources: x}"
    begin_all(Ledger.open(here, plan(text=alone)), plan(text=alone))
    with pytest.raises(
        LedgerRefuses, match=r"training.anneals: was true, is false[\s\S]*another training.lr_scheduler"
    ):
        Ledger.open(here, plan(text=behind))
    other = text % ", {name: b, sources: x, training: {lr_scheduler: wsd}}"
    assert Ledger.open(here, plan(text=other)).record.phases[1].state == "pending", "the control"
