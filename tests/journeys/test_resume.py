"""Stopped and gone on with, a run ends in the same bits as one that was never stopped."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.errors import Interrupted
from tests.journeys.conftest import Ran, Tiny, ZERO3
from tests.journeys.runs import all_of

KINDS: dict[str, dict[str, Any]] = {
    "LoRA, ZeRO-2, fp32": {},
    "LoRA, ZeRO-3, bf16": {"training": {"deepspeed": "zero3.json"}, "model": {"precision": "bf16"}},
    "QLoRA, ZeRO-2, bf16": {"model": {"use_4bit": True, "precision": "bf16"}},
    "every weight, ZeRO-2, bf16": {"lora": {"enabled": False}, "model": {"precision": "bf16"}},
}


def to_the_end(ran: Ran, config: dict[str, Any], steps_today: int, **how: Any) -> int:
    """The same call, until it finishes; returns how often it was stopped."""
    for stops in range(40):
        try:
            ran(config, steps_today=steps_today, **how)
            return stops
        except Interrupted:
            continue
    raise AssertionError("it never comes to an end")


@pytest.mark.requirement("R-02", "S-03", "S-08")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_takes_one_step_a_day_ends_as_one_that_is_never_stopped(tiny: Tiny, ran: Ran, kind: str) -> None:
    """Dropout, accumulation, an epoch that ends within, a best that is not the last: all of it, to the bit."""
    config = tiny(**KINDS[kind])
    config["lora"]["dropout"] = 0.1
    config["phases"] = config["phases"][:2]
    ran(config)
    whole = all_of(Path("run"))
    shutil.rmtree("run")
    assert to_the_end(ran, config, 1) == 7, "of eight steps every one but the last"
    assert all_of(Path("run")) == whole
