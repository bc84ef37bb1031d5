"""Handovers that begin a fresh adapter: on a base that has the last one merged, or on top of the last one, frozen."""

import json
import shutil
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file

from phased_cpt.errors import InputError, LedgerRefuses, PhasedCptError
from phased_cpt.ledger import PhaseRecord, read_record
from phased_cpt.run_dir import RunDir
from tests.journeys.conftest import Ran, Tiny
from tests.journeys.runs import all_of
from tests.journeys.test_handover import at_start, watched  # noqa: F401 - a fixture
from tests.journeys.test_merge import merged_quickly  # noqa: F401 - a fixture
from tests.journeys.test_resume import to_the_end
from tests.zygote import ForkedJobs

pytestmark = pytest.mark.usefixtures("merged_quickly")

RUN = Path("run")
FOUNDATION, EVOLUTION, REVIEWS = "phase1_foundation", "phase2_evolution", "phase3_pr_mastery"
ZERO3_BF16 = {"training": {"deepspeed": "zero3.json"}, "model": {"precision": "bf16"}}


def chain(tiny: Tiny, *handovers: str, **sections: Any) -> dict[str, Any]:
    """Phases of two steps at a rate that moves something, each with its handover."""
    config = tiny(**{**sections, "training": {"learning_rate": 0.01, **sections.get("training", {})}})
    given = zip_longest(config["phases"], handovers, fillvalue="continue")
    return config | {"phases": [{**phase, "max_steps": 2, "handover": how} for phase, how in given]}


def records() -> dict[str, PhaseRecord]:
    record = read_record(RunDir(RUN))
    assert record is not None
    return {phase.name: phase for phase in record.phases}


def added_by(folder: Path) -> dict[str, numpy.ndarray]:
    """What an adapter adds to each weight of the base, by its name there."""
    found, weights = {}, load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    for name, a in weights.items():
        if ".lora_A." in name:
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            place = name.removeprefix("base_model.model.").replace(".lora_A", "")
            found[place] = config["lora_alpha"] / config["r"] * (b @ a)
    return found


def whole(folder: Path) -> dict[str, numpy.ndarray]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


@pytest.mark.requirement("S-01", "S-02")
def test_after_a_merge_the_next_phase_begins_a_fresh_adapter_on_base_and_adapter(
    tiny: Tiny,
    ran: Ran,
    watched: ForkedJobs,  # noqa: F811
) -> None:
    """And may have a rank of its own; what was learnt before is in the base, in every number of it."""
    config = chain(tiny, "merge", data={"eval_share": 0})
    config["phases"] = config["phases"][:2]
    config["phases"][1]["lora"] = {"r": 2, "alpha": 4}
    outcome = ran(config, door=watched)
    base, merged = whole(RUN / "random_base"), whole(RUN / FOUNDATION / "merged_base")
    added = added_by(RUN / FOUNDATION / "best_adapter")
    assert merged.keys() == base.keys() and added.keys() < base.keys()
    for name, weight in base.items():
        wanted = weight + added.get(name, 0)
        assert numpy.abs(merged[name] - wanted).max() <= 1e-6 * numpy.abs(wanted).max()
    moved = [name for name in added if not numpy.array_equal(merged[name], base[name])]
    assert sorted(moved) == sorted(added), "the control: the base alone is another one"
    frozen = at_start(outcome, 2, "frozen")
    seen = {name: each for name, each in frozen.items() if name.endswith("q_proj.base_layer.weight")}
    assert len(seen) == 2
    for name, each in seen.items():
        place = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert numpy.array_equal(each, merged[place]), "the ranks train on it, to the bit"
    fresh = at_start(outcome, 2, "step0")
    assert all(not each.any() for name, each in fresh.items() if ".lora_B." in name)
    assert json.loads((RUN / EVOLUTION / "best_adapter" / "adapter_config.json").read_bytes())["r"] == 2
    handed = records()["foundation"].handed_over
    assert handed is not None and (handed.kind, handed.folder) == ("base", f"{FOUNDATION}/merged_base")
    assert records()["evolution"].started_from == handed


@pytest.mark.parametrize("kind", ["ZeRO-2, fp32", "ZeRO-3, bf16"])
def test_in_a_stack_the_earlier_adapter_is_frozen_and_in_use(
    kind: str,
    tiny: Tiny,
    ran: Ran,
    watched: ForkedJobs,  # noqa: F811
) -> None:
    exact = kind.startswith("ZeRO-2")
    outcome = ran(chain(tiny, "stack", "continue", **({} if exact else ZERO3_BF16)), door=watched)
    first = load_file(RUN / FOUNDATION / "best_adapter" / "adapter_model.safetensors")
    for number in (2, 3):
        frozen = {name: each for name, each in at_start(outcome, number, "frozen").items() if ".below_1." in name}
        assert len(frozen) == len(first) == 28
        for name, each in frozen.items():
            wanted = first[name.replace(".below_1.", ".")]
            assert numpy.abs(each - wanted).max() <= (0 if exact else 2**-8 * abs(wanted).max())
    second = at_start(outcome, 2, "step0")
    assert all(not each.any() for name, each in second.items() if ".lora_B." in name), "the one that learns is fresh"
    adapters = {
        name: [each.folder for each in found.published.adapters] for name, found in records().items() if found.published
    }
    assert adapters == {
        "foundation": [f"{FOUNDATION}/best_adapter"],
        "evolution": [f"{FOUNDATION}/best_adapter", f"{EVOLUTION}/best_adapter"],
        "pr_mastery": [f"{FOUNDATION}/best_adapter", f"{REVIEWS}/best_adapter"],
    }
    # In use: what phase 2 loses before it trains is what phase 1 has left, and not what the base loses.
    row = json.loads((RUN / FOUNDATION / "best_adapter" / "source.json").read_bytes())
    begin = json.loads((RUN / EVOLUTION / "best_adapter" / "source.json").read_bytes())["start"]["eval_loss"]
    assert begin == pytest.approx(row["row"]["evolution"]["eval_loss"], rel=1e-6 if exact else 1e-3)
    if exact:
        assert begin != pytest.approx(row["row_before"]["evolution"]["eval_loss"], rel=1e-4), "the control"


@pytest.mark.requirement("R-02", "S-03")
@pytest.mark.parametrize(
    ("handovers", "sections"),
    [
        (("merge", "stack"), {}),
        (("stack", "merge"), ZERO3_BF16),
        (("merge", "merge"), {"model": {"precision": "bf16", "use_4bit": True}}),
    ],
)
def test_a_chain_that_takes_one_step_a_day_ends_as_one_that_is_never_stopped(
    handovers: tuple[str, str], sections: dict[str, Any], tiny: Tiny, ran: Ran
) -> None:
    config = chain(tiny, *handovers, **sections)
    ran(config)
    at_once = all_of(RUN)
    shutil.rmtree(RUN)
    assert to_the_end(ran, config, 1) == 5
    assert all_of(RUN) == at_once


def test_a_base_that_was_merged_goes_with_the_next_and_comes_back_where_it_is_wanted(tiny: Tiny, ran: Ran) -> None:
    config = chain(tiny, "merge", "merge")
    ran(config)
    before = records()
    assert not (RUN / FOUNDATION / "merged_base").exists(), "phase 3 stands on another one"
    assert (RUN / EVOLUTION / "merged_base").exists()
    assert ran(config).trained == (), "nothing is missed"
    assert ran(config, redo_from="evolution").trained == ("evolution", "pr_mastery")
    assert records()["foundation"] == before["foundation"]
    assert records()["evolution"].published == before["evolution"].published, "from the same base, to the bit"
    # The negative control: of another adapter nothing is made.
    shutil.rmtree(RUN / FOUNDATION / "merged_base", ignore_errors=True)
    weights = RUN / FOUNDATION / "best_adapter" / "adapter_model.safetensors"
    spoilt = bytearray(weights.read_bytes())
    spoilt[-2] ^= 0x40
    weights.write_bytes(bytes(spoilt))
    with pytest.raises(PhasedCptError, match="not what was published"):
        ran(config, redo_from="evolution")


def test_how_a_phase_hands_over_may_change_until_the_next_one_has_begun(tiny: Tiny, ran: Ran) -> None:
    config = chain(tiny)
    ran(config, last="foundation")
    config["phases"][0]["handover"] = "stack"
    ran(config, last="evolution")
    published = records()["evolution"].published
    assert published is not None and len(published.adapters) == 2
    config["phases"][0]["handover"] = "merge"
    with pytest.raises(LedgerRefuses, match='handover: was "stack", is "merge"'):
        ran(config)


@pytest.mark.requirement("T-11")
def test_any_phase_may_train_every_weight_of_what_was_merged(tiny: Tiny, ran: Ran) -> None:
    """LoRA → merged → every weight → LoRA: the second starts from base and adapter, the third from its whole model."""
    config = chain(tiny, "merge")
    config["phases"][1]["lora"] = {"enabled": False}
    ran(config)
    found = records()
    middle, last = found["evolution"].published, found["pr_mastery"].published
    assert found["evolution"].started_from == found["foundation"].handed_over
    assert middle is not None and middle.kind == "base"
    assert found["pr_mastery"].started_from == middle
    assert last is not None and [each.folder for each in last.adapters] == [f"{REVIEWS}/best_adapter"]
    merged, trained = whole(RUN / FOUNDATION / "merged_base"), whole(RUN / EVOLUTION / "best_model")
    assert merged.keys() >= trained.keys()
    assert 0 < max(float(numpy.abs(trained[name] - merged[name]).max()) for name in trained) < 0.1, "two steps away"


# What the optimizer knew ------------------------------------------------------------------------------------------------

CARRYING: dict[str, Any] = {
    "training": {"lr_scheduler": "constant", "warmup_steps": 0},
    "evaluation": {"every_steps": 2, "publish": "last"},
}


@pytest.mark.parametrize("kind", ["ZeRO-2, fp32", "ZeRO-3, bf16", "every weight"])
def test_an_optimizer_that_is_carried_knows_what_it_knew(kind: str, tiny: Tiny, ran: Ran) -> None:
    """To the bit, wherever DeepSpeed keeps it; one that is reset begins with zeros, and trains other weights."""
    sections: dict[str, Any] = {key: dict(value) for key, value in CARRYING.items()}
    if kind == "ZeRO-3, bf16":
        sections["training"]["deepspeed"], sections["model"] = "zero3.json", {"precision": "bf16"}
    if kind == "every weight":
        sections["lora"] = {"enabled": False}
    config = chain(tiny, **sections)
    config["phases"] = config["phases"][:2]
    ran(config)
    reset = whole(next((RUN / EVOLUTION).glob("best_*")))
    shutil.rmtree(RUN)
    config["phases"][1]["training"] = {"optimizer_at_start": "carry"}
    ran(config)
    assert "moments of the optimizer of the phase before, to the bit" in (RUN / "logs/training.log").read_text()
    carried = whole(next((RUN / EVOLUTION).glob("best_*")))
    assert any(not numpy.array_equal(carried[name], reset[name]) for name in carried), "the control"
    record = records()["evolution"].fingerprint
    assert record is not None and "optimizer" in record.parts
    at_once = all_of(RUN)
    shutil.rmtree(RUN)
    assert to_the_end(ran, config, 1) == 3
    assert all_of(RUN) == at_once, "stopped and gone on with, it is the same"


def test_what_was_not_kept_cannot_be_carried_on(tiny: Tiny, ran: Ran) -> None:
    config = chain(tiny, **CARRYING)
    config["phases"] = config["phases"][:2]
    ran(config, last="foundation")
    config["phases"][1]["training"] = {"optimizer_at_start": "carry"}
    with pytest.raises(InputError, match=r"--redo-from foundation.*optimizer_at_start: reset in evolution"):
        ran(config)
    assert ran(config, redo_from="foundation").finished
