"""DoRA, rsLoRA and LoRA+ through whole runs: handed over to the bit, stopped anywhere, merged into what was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.journeys.conftest import Ran, Tiny
from tests.journeys.runs import all_of
from tests.journeys.test_handover import at_start, bf16, differ, phases, published, watched  # noqa: F401 - a fixture
from tests.journeys.test_merge import EXACT, HERE, MERGED, merged_quickly  # noqa: F401 - a fixture
from tests.journeys.test_resume import to_the_end
from tests.zygote import ForkedJobs, Zygote

pytestmark = pytest.mark.usefixtures("merged_quickly")

RUN = Path("run")
DORA = {"r": 4, "alpha": 8, "target_modules": "auto", "use_dora": True, "dropout": 0.1}
RSLORA = {"r": 16, "alpha": 8, "target_modules": "auto", "use_rslora": True, "init": "gaussian"}
BF16 = {"model": {"precision": "bf16"}}
FOUR_BITS = {"model": {"precision": "bf16", "use_4bit": True}}
ZERO3 = {"deepspeed": "zero3.json"}

KINDS: dict[str, tuple[dict[str, Any], int]] = {  # and the tensors of the adapter: A, B and DoRA's magnitudes
    "DoRA, ZeRO-2, fp32": ({"lora": DORA}, 42),
    "DoRA, ZeRO-3, bf16": ({"lora": DORA, "training": ZERO3} | BF16, 42),
    "DoRA on 4 bits, ZeRO-2": ({"lora": DORA} | FOUR_BITS, 42),
    "rsLoRA and LoRA+, ZeRO-3, bf16": ({"lora": RSLORA, "training": ZERO3 | {"lora_plus_ratio": 4}} | BF16, 28),
}


@pytest.mark.requirement("S-01", "S-02")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_is_handed_over_to_the_bit(
    kind: str,
    tiny: Tiny,
    ran: Ran,
    watched: ForkedJobs,  # noqa: F811
) -> None:
    sections, tensors = KINDS[kind]
    outcome = ran(tiny(**sections, data={"eval_share": 0}, phases=phases(tiny, {}, {})), door=watched)
    first, start = published(outcome, 1), at_start(outcome, 2, "step0")
    assert len(first) == tensors
    assert differ(start, first) == 0
    assert differ(published(outcome, 2), first) == tensors, "all of it has learnt"
    if sections.get("model"):
        assert differ(at_start(outcome, 2, "loaded"), first) == tensors, "the control: what is loaded is rounded"
        assert differ(at_start(outcome, 2, "computed"), bf16(first)) == 0
    written = json.loads((RUN / "phase2_evolution/best_adapter/adapter_config.json").read_bytes())
    assert (written["use_dora"], written["use_rslora"]) == (tensors == 42, tensors == 28)


@pytest.mark.parametrize(
    "kind, stops", [("DoRA, ZeRO-3, bf16", 7), ("rsLoRA and LoRA+, ZeRO-3, bf16", 7)], ids=["DoRA", "rsLoRA, LoRA+"]
)
def test_an_adapter_of_any_kind_ends_in_the_same_bits_wherever_it_is_stopped(
    kind: str, stops: int, tiny: Tiny, ran: Ran
) -> None:
    config = tiny(**KINDS[kind][0])
    config["phases"] = config["phases"][:2]
    ran(config)
    at_once = all_of(RUN)
    shutil.rmtree(RUN)
    assert to_the_end(ran, config, 1) == stops
    assert all_of(RUN) == at_once


@pytest.mark.parametrize("lora", [DORA, RSLORA], ids=["DoRA", "rsLoRA"])
def test_an_adapter_of_any_kind_is_merged_into_the_model_that_it_was(
    lora: dict[str, Any], tiny: Tiny, ran: Ran, zygote: Zygote, tmp_path: Path
) -> None:
    ran(tiny(lora=lora, training={"learning_rate": 0.01}, merge={"enabled": True}, phases=phases(tiny, {}, {})))
    found = zygote.call(f"{HERE}:compared", str(MERGED), "run", None, folder=tmp_path / "compared")
    assert found["off"] < EXACT < found["base"], found
    assert found["odd keys"] == 0


@pytest.mark.requirement("T-02")
def test_infinite_is_one_schedule_over_all_phases(tiny: Tiny, ran: Ran) -> None:
    """4 + 4 + 4 steps: up, down to half of the peak, on at that, and to the end; a kill between changes nothing."""
    how = {"lr_scheduler": "infinite", "cooldown_ratio": 0.5, "decay_ratio": 0.5, "min_lr_ratio": 0.1}
    config = tiny(training=how | {"constant_ratio": 0.5}, data={"eval_share": 0})
    assert to_the_end(ran, config, 5) == 2
    rates = [line["learning_rate"] for steps in all_of(RUN)["steps"].values() for line in steps]
    wave, drop = (1 + numpy.cos(numpy.pi / 2)) / 2, numpy.sqrt(0.5)
    expected = [0.5, 1, 0.5 + 0.5 * wave, 0.5] + [0.5] * 4 + [0.5, 0.5, 0.5, 0.1 + 0.4 * (1 - drop)]
    assert rates == pytest.approx([1e-3 * each for each in expected], rel=1e-12)
