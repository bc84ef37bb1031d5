"""Stopped and gone on with, a run ends in the same bits as one that was never stopped."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.data.cache import sha256_of
from phased_cpt.errors import InputError, Interrupted, PhasedCptError
from phased_cpt.ledger import read_record
from phased_cpt.run_dir import RunDir
from tests.journeys.conftest import Ran, Tiny, lines
from tests.journeys.runs import all_of

KINDS: dict[str, dict[str, Any]] = {
    "LoRA, ZeRO-2, fp32": {},
    "LoRA, ZeRO-3, bf16": {"training": {"deepspeed": "zero3.json"}, "model": {"precision": "bf16"}},
    "QLoRA, ZeRO-2, bf16": {"model": {"use_4bit": True, "precision": "bf16"}},
    "LoRA, ZeRO-3, offloaded": {"training": {"deepspeed": "offload.json"}, "model": {"precision": "bf16"}},
    "LoRA without ZeRO, fp32": {"training": {"deepspeed": "zero0.json"}},
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


@pytest.mark.requirement("R-02")
def test_on_other_ranks_and_another_stage_the_same_blocks_give_the_same_losses(tiny: Tiny, ran: Ran) -> None:
    """Not to the bit: sums are rounded in another order. The ledger says so."""
    config = tiny(lora={"dropout": 0.1, "r": 4, "alpha": 8, "target_modules": "auto"})
    config["phases"] = [{**config["phases"][0], "max_steps": 8}]
    ran(config)
    whole = all_of(Path("run"))["steps"]["phase1_foundation"]
    shutil.rmtree("run")
    zero0, zero3 = (
        {**config, "training": {**config["training"], "deepspeed": name}} for name in ("zero0.json", "zero3.json")
    )
    for settings, ranks in ((config, 2), (zero3, 1), (zero0, 2), (zero3, 2)):
        try:
            ran(settings, ranks=ranks, steps_today=2)
        except Interrupted:
            continue
    steps = all_of(Path("run"))["steps"]["phase1_foundation"]
    for key in ("step", "learning_rate", "tokens_seen"):
        assert [line[key] for line in steps] == [line[key] for line in whole]
    assert [line["loss"] for line in steps] == pytest.approx([line["loss"] for line in whole], rel=1e-3)
    assert steps[:2] == whole[:2] and steps != whole
    inexact = [attempt.inexact.keys() for attempt in read_record(RunDir(Path("run"))).attempts]  # type: ignore[union-attr]
    assert [len(keys) > 0 for keys in inexact] == [False, True, True, True]
    assert "foundation.ranks" in inexact[1] and "foundation.training.deepspeed" in inexact[2]


# What an optimizer remembers: by weight, nothing, or quantised over the part of a rank, which is then large enough.
OPTIMIZERS = ["lion_32bit", "adafactor", "sgd", "adagrad", "paged_adamw_8bit"]


@pytest.mark.requirement("R-02")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer_goes_on_to_the_bit(tiny: Tiny, ran: Ran, optimizer: str) -> None:
    config = tiny(
        training={"optimizer": optimizer}, lora={"r": 32, "alpha": 8, "dropout": 0.1, "target_modules": "auto"}
    )
    config["phases"] = config["phases"][:1]
    ran(config)
    whole = all_of(Path("run"))
    shutil.rmtree("run")
    with pytest.raises(Interrupted):
        ran(config, steps_today=2)
    saved = sorted(path.name for path in Path("run").glob("*/checkpoints/checkpoint-2/optimizer*"))
    if optimizer == "paged_adamw_8bit":
        assert saved == ["optimizer-0.safetensors", "optimizer-1.safetensors"]
        with pytest.raises(
            PhasedCptError, match=r"the parts of 2 ranks .*; go on with the same, or .*--resume none"
        ) as no:
            ran(config, ranks=1)
        assert no.value.exit_code == 2
    else:
        assert saved == ["optimizer.safetensors"]
    ran(config)
    assert all_of(Path("run")) == whole


@pytest.mark.requirement("R-01")
def test_a_run_goes_on_from_the_newest_checkpoint_from_another_or_from_none(tiny: Tiny, ran: Ran) -> None:
    """What lies beyond is kept under another name."""
    config = tiny(checkpoint={"every_steps": 1, "keep_published": True})
    config["phases"] = config["phases"][:2]
    ran(config)
    whole = all_of(Path("run"))["weights"]
    with pytest.raises(InputError, match=r"^--resume 2: no phase is under way in run; leave it out$"):
        ran(config, resume="2")
    shutil.rmtree("run")
    begun: list[int | None] = []
    for resume, today in ((None, 3), (None, 0), ("1", 1), ("none", 1), ("1", None)):
        if today == 0:
            with pytest.raises(InputError, match=r"--resume: .*checkpoint-7: no such checkpoint; .* steps: 3, 2, 1"):
                ran(config, resume="7")
            continue
        if today is None:
            assert ran(config, resume=resume).finished, "what is named is of the phase under way, not of those to come"
        else:
            with pytest.raises(Interrupted):
                ran(config, resume=resume, steps_today=today)
        record = read_record(RunDir(Path("run")))
        assert record is not None
        begun.append(record.attempts[-1].resumed["foundation"])
    assert begun == [0, 1, 0, 1]
    kept = {path.name for path in Path("run/phase1_foundation/checkpoints").iterdir()}
    assert {"checkpoint-2.aside", "checkpoint-3.aside", "checkpoint-1.aside", "checkpoint-2.aside2"} <= kept
    assert all_of(Path("run"))["weights"] == whole
    assert ran(config).trained == ()


def test_random_weights_that_have_changed_are_refused_and_made_again(tiny: Tiny, ran: Ran) -> None:
    """They are no file of the user's, but what a half-done phase stands on all the same."""
    config = tiny()
    config["phases"] = config["phases"][:1]
    ran(config)
    whole = all_of(Path("run"))["weights"]
    shutil.rmtree("run")
    with pytest.raises(Interrupted):
        ran(config, steps_today=2)
    path = Path("run/random_base/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(PhasedCptError, match=r"random_base: the random weights are not those .*; delete the folder"):
        ran(config)
    shutil.rmtree("run/random_base")
    ran(config)
    assert all_of(Path("run"))["weights"] == whole


@pytest.mark.requirement("R-02")
def test_ranks_that_do_not_divide_a_weight_go_on_to_the_bit(tiny: Tiny, ran: Ran) -> None:
    """Under ZeRO-3 the last of three ranks holds less of a weight than the others, and DeepSpeed's own setter fails."""
    config = tiny(training={"deepspeed": "zero3.json", "global_batch_size": 6}, model={"precision": "bf16"})
    config["lora"]["dropout"] = 0.1
    config["phases"] = config["phases"][:1]
    ran(config, ranks=3)
    whole = all_of(Path("run"))
    shutil.rmtree("run")
    assert to_the_end(ran, config, 2, ranks=3) == 1
    assert all_of(Path("run")) == whole


def test_a_stop_while_checkpoints_are_looked_at_damages_none(
    tiny: Tiny, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones take seconds to hash, right after the start, which is when people think better of it."""
    config = tiny(checkpoint={"every_steps": 1, "keep": 1})
    config["phases"] = config["phases"][:1]
    with pytest.raises(Interrupted):
        ran(config, steps_today=2)

    def stopped(path: Path) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return sha256_of(path)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("phased_cpt.sealed.sha256_of", stopped)
        ran(config)
    assert [path.name for path in Path("run/phase1_foundation/checkpoints").glob("checkpoint*")] == ["checkpoint-2"]
    with pytest.raises(Interrupted):
        ran(config, steps_today=1)
    assert [line["step"] for line in lines(Path("run/phase1_foundation/logs/train.jsonl"))] == [1, 2, 3]


def test_what_was_set_aside_or_copied_elsewhere_can_be_gone_on_from(tiny: Tiny, ran: Ran) -> None:
    """With the best weights that it stands on, which are others by then."""
    config = tiny(checkpoint={"every_steps": 1, "keep": 9}, evaluation={"every_steps": 1})
    config["phases"] = [config["phases"][0] | {"max_steps": 6}]
    ran(config)
    whole = all_of(Path("run"))["weights"]
    shutil.rmtree("run")
    checkpoints = Path("run/phase1_foundation/checkpoints")
    with pytest.raises(Interrupted):
        ran(config, steps_today=4)
    shutil.copytree(checkpoints, "elsewhere")
    with pytest.raises(Interrupted):
        ran(config, resume="1", steps_today=1)
    for place in (checkpoints / "checkpoint-4.aside", Path("elsewhere/checkpoint-3")):
        with pytest.raises(Interrupted):
            ran(config, resume=str(place), steps_today=1)
    (checkpoints / "checkpoint-4/adapter_config.json").unlink()
    (checkpoints / "checkpoint-4/adapter_config.json").symlink_to("nowhere")
    ran(config)
    attempt = read_record(RunDir(Path("run"))).attempts[-1]  # type: ignore[union-attr]
    assert attempt.resumed == {"foundation": 3}, "a file that cannot be read is damage, and the one before is used"
    assert all_of(Path("run"))["weights"] == whole
