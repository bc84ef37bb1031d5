"""Whether a phase fits: a verdict, other settings that hold what they promise, and the file that `auto` stands for."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.bases import Base
from phased_cpt.config import Loaded, load
from phased_cpt.errors import InputError
from phased_cpt.fitting import Hardware, PhaseFit, disk_needs, filled_file, fit, fit_merge, phase_times, remember_speed
from phased_cpt.fitting.files import base_to_estimate, chosen_file
from phased_cpt.fitting.hardware import host_memory
from phased_cpt.plan import Plan, make_plan
from phased_cpt.schedule import Prepared
from tests.conftest import Call, Write

GB = 10**9
QWEN3_32B = {
    "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "dtype": "bfloat16",
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16",
}  # fmt: skip
RUN = """\
    run: {dir: run, cache_dir: cache}
    model: {name: base, attention: flash_attention_2}
    lora: {r: 16}
    data: {max_tokens: 4096}
    training: {micro_batch_size: 2}
    phases:
      - {name: foundation, sources: a.jsonl, max_steps: 100}
      - {name: evolution, sources: a.jsonl, max_steps: 100, data: {max_tokens: 2048}}
"""

Planned = Callable[..., Plan]


@pytest.fixture
def planned(write: Write) -> Planned:
    """The run above on a base of which there is only a config.json, counted for so many ranks."""

    def plan(*overrides: str, ranks: int = 1, shape: dict[str, Any] | None = None) -> Plan:
        write(json.dumps(shape or LLAMA_8B), "base/config.json")
        write('{"text": "hello"}\n', "a.jsonl")
        loaded = load(write(RUN), list(overrides))
        return make_plan(Loaded(loaded.config, loaded.places), ranks)

    return plan


def gpus(count: int, size: int, host: int = 2_000 * GB) -> Hardware:
    return Hardware(count, 1, size, host)


def of_foundation(plan: Plan, hardware: Hardware) -> PhaseFit:
    return fit(plan, Base("base", ""), hardware)[0]


# Verdicts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "verdict"), [(80 * GB, "fits"), (26 * GB, "tight"), (24 * GB, "does not fit"), (0, "not known")]
)
def test_the_verdict_follows_the_hardware(size: int, verdict: str, planned: Planned) -> None:
    found = of_foundation(planned(), gpus(1, size))
    assert (found.verdict, bool(found.why)) == (verdict, verdict != "fits")


def test_a_margin_is_left(planned: Planned) -> None:
    """80 GB of a GPU are not 80 GB for a phase: CUDA takes some, and the allocator holds some that it cannot give."""
    assert gpus(1, 80 * GB).room == int(80 * GB * 0.94) - int(1.5 * GB)
    assert gpus(8, 80 * GB).room == gpus(1, 80 * GB).room
    assert Hardware(8, 1, None, 80 * GB).room < 80 * GB // 8


def test_a_host_that_is_too_small_is_told(planned: Planned) -> None:
    """An offload keeps masters and moments of every weight there: 8 × 8 billion × 12 bytes in all."""
    plan = planned("lora.enabled=false", "training.deepspeed=zero2_offload", ranks=8)
    found = of_foundation(plan, gpus(8, 141 * GB, host=100 * GB))
    assert (found.verdict, "of the host" in found.why) == ("does not fit", True)
    assert of_foundation(plan, gpus(8, 141 * GB)).verdict == "fits"


def test_each_phase_is_estimated_with_its_own_settings(planned: Planned) -> None:
    foundation, evolution = fit(planned(), Base("base", ""), gpus(1, 80 * GB))
    assert foundation.device.peak > evolution.device.peak


def test_a_model_that_is_not_known_gets_no_figure(planned: Planned) -> None:
    found = of_foundation(planned(shape={"model_type": "mamba2", "hidden_size": 64}), gpus(1, 80 * GB))
    assert (found.verdict, found.device.peak, found.changes) == ("not known", 0, ())
    assert "mamba2" in found.why


def test_of_a_model_that_is_not_known_the_files_may_be_too_large_already(planned: Planned) -> None:
    plan = planned(shape={"model_type": "mamba2", "hidden_size": 64})
    with Path("base/model.safetensors").open("wb") as file:
        file.truncate(90 * GB)  # without a byte on the disk
    assert of_foundation(plan, gpus(1, 80 * GB)).verdict == "does not fit"
    assert of_foundation(plan, gpus(1, 141 * GB)).verdict == "not known"


# The merge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "verdict"), [(64 * GB, "fits"), (int(1.44 * GB), "tight"), (GB, "does not fit"), (0, "not known")]
)
def test_the_merge_is_judged_by_the_memory_of_the_host(memory: int, verdict: str, planned: Planned) -> None:
    """4096 × 14336 weights at 14 bytes: 0.8 GB, of what Python and the system leave. The ranks are gone by then."""
    found = fit_merge(planned(ranks=8), Base("base", ""), Hardware(8, 1, None, memory))
    assert found is not None
    assert (found.host.peak, found.verdict, bool(found.why)) == (4096 * 14336 * 14, verdict, verdict != "fits")


def test_a_merge_that_is_not_made_needs_nothing(planned: Planned) -> None:
    assert fit_merge(planned("merge.enabled=false"), Base("base", ""), gpus(1, 80 * GB)) is None


def test_the_merge_of_a_model_that_is_not_known_gets_no_figure(planned: Planned) -> None:
    found = fit_merge(planned(shape={"model_type": "mamba2"}), Base("base", ""), gpus(1, 80 * GB))
    assert found is not None
    assert (found.verdict, found.host.peak, "mamba2" in found.why) == ("not known", 0, True)


@pytest.mark.parametrize(
    ("overrides", "a_weight"),
    [
        ((), 14),
        (("merge.dtype=fp32",), 6 + 16),  # fp32 and what was read; four times 4 on its way
        (("model.use_4bit=true",), 24),
        (("model.use_4bit=true", "merge.base=bf16"), 24),  # what 4 bits have taken is told all the same
    ],
)
def test_the_merge_follows_the_configuration(overrides: tuple[str, ...], a_weight: int, planned: Planned) -> None:
    found = fit_merge(planned(*overrides), Base("base", ""), gpus(1, 80 * GB))
    assert found is not None and found.host.peak == 4096 * 14336 * a_weight


# Changes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "count", "size", "overrides"),
    [
        (LLAMA_8B, 1, 24, ()),
        (LLAMA_8B, 1, 24, ("training.loss=plain", "training.gradient_checkpointing=false")),
        (LLAMA_8B, 8, 24, ("training.deepspeed=zero2", "phases.foundation.training.micro_batch_size=4")),
        (LLAMA_8B, 8, 48, ("lora.enabled=false", "training.deepspeed=zero2", "data.max_tokens=16384")),
        (LLAMA_8B, 1, 48, ("data.max_tokens=32768",)),  # auto: ZeRO-3 above 16K
        (QWEN3_32B, 1, 80, ("data.max_tokens=32768",)),
        (QWEN3_32B, 8, 80, ("data.max_tokens=32768", "training.global_batch_size=48")),
    ],
)
def test_what_is_said_to_fit_does_when_it_is_typed(
    shape: dict[str, Any], count: int, size: int, overrides: tuple[str, ...], planned: Planned
) -> None:
    hardware = gpus(count, size * GB)
    before = of_foundation(planned(*overrides, ranks=count, shape=shape), hardware)
    assert before.verdict in ("does not fit", "tight")
    assert any(change.fits for change in before.changes)
    for change in before.changes:
        typed = [option.removeprefix("--set ") for option in change.set]
        after = of_foundation(planned(*overrides, *typed, ranks=count, shape=shape), hardware)
        assert after.device.peak == change.bytes < before.device.peak
        assert after.verdict == change.verdict


def test_where_nothing_fits_the_nearest_is_told(planned: Planned) -> None:
    found = of_foundation(planned("lora.r=4096", shape=QWEN3_32B), gpus(1, 8 * GB))
    assert [change.fits for change in found.changes] == [False]
    assert found.changes[0].bytes < found.device.peak


def test_what_is_tight_is_better_than_nothing(planned: Planned) -> None:
    """A 32B in 4 bits is loaded whole on each GPU before ZeRO-3 shards it: that moment no setting makes smaller."""
    plan = planned("model.use_4bit=true", "training.micro_batch_size=1", ranks=2, shape=QWEN3_32B)
    found = of_foundation(plan, gpus(2, 24 * GB))
    assert [(change.set, change.verdict) for change in found.changes] == [
        (("--set training.deepspeed=zero3",), "tight")
    ]


def test_a_lower_rank_keeps_its_scale_and_a_given_adapter_its_rank(planned: Planned) -> None:
    """Of 32 billion weights in 4 bits, on one GPU of 24 GB, what is trained at rank 128 alone takes 17."""
    alone = planned("model.use_4bit=true", "training.micro_batch_size=1", "lora.r=128", shape=QWEN3_32B)
    (change,) = of_foundation(alone, gpus(1, 24 * GB)).changes
    assert {"--set lora.r=8", "--set lora.alpha=16"} <= set(change.set)
    given = planned("model.use_4bit=true", "training.micro_batch_size=1", "model.adapter=adapter", shape=QWEN3_32B)
    for change in of_foundation(given, gpus(1, 24 * GB)).changes:
        assert not any("lora.r" in each for each in change.set), "the control"


def test_a_row_at_a_time_keeps_the_batch(planned: Planned) -> None:
    said = of_foundation(planned("training.micro_batch_size=16"), gpus(1, 30 * GB)).changes
    assert "--set training.gradient_accumulation_steps=96" in said[0].set  # 16 × 6 rows, as before


# `auto` ---------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("T-01")
@pytest.mark.parametrize(
    ("size", "overrides", "file"),
    [
        (80, (), "zero2"),
        (24, (), "zero3"),  # the weights alone take 16 of the 21 that may be used
        (24, ("model.use_4bit=true",), "zero2"),
        (141, ("data.max_tokens=32768",), "zero3"),  # long rows need what ZeRO-3 frees
        (24, ("training.deepspeed=zero2",), "zero2"),
    ],
)
def test_auto_takes_what_the_estimate_says(size: int, overrides: tuple[str, ...], file: str, planned: Planned) -> None:
    phase = planned(*overrides, ranks=8).phases[0]
    assert chosen_file(phase, Base("base", ""), gpus(8, size * GB)) == file
    assert filled_file(phase, Base("base", ""), gpus(8, size * GB))["zero_optimization"]["stage"] == int(file[4])


def test_auto_looks_at_activations_as_well(planned: Planned) -> None:
    """The size of the files said that an 8B fits into 32 GB; with all logits of 8 rows it does not."""
    phase = planned("training.loss=plain", "training.micro_batch_size=8", ranks=8).phases[0]
    assert chosen_file(phase, Base("base", ""), gpus(8, 32 * GB)) == "zero3"
    assert (
        chosen_file(planned("training.micro_batch_size=1", ranks=8).phases[0], Base("base", ""), gpus(8, 32 * GB))
        == "zero2"
    )


def test_without_a_gpu_auto_asks_for_no_estimate(planned: Planned) -> None:
    assert chosen_file(planned(ranks=2).phases[0], Base("base", ""), Hardware(2, 1, None, GB)) == "zero2"


# The machine ----------------------------------------------------------------------------------------------------------


def test_a_container_has_what_it_may_take(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000 kB\nMemFree:  10 kB\n")
    assert host_memory(tmp_path) == 1_024_000
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for said, found in (("max", 1_024_000), ("500000", 500_000)):
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(said)
        assert host_memory(tmp_path) == found


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "config.json cannot be read"), ("[]", "holds no object"), ('{"model_type": "llama"}', "")],
)
def test_a_config_that_is_damaged_is_told(content: str, said: str, planned: Planned, call: Call) -> None:
    planned()
    Path("base/config.json").write_text(content)
    answer = call("plan", "-c", "run.yaml", "--fit")
    assert (answer.code, said in answer.err) == (2 if said else 0, True)
    assert "Traceback" not in answer.err


def test_a_config_whose_numbers_are_none_is_not_known(planned: Planned) -> None:
    found = of_foundation(planned(shape=LLAMA_8B | {"num_hidden_layers": "many"}), gpus(1, 80 * GB))
    assert (found.verdict, found.why) == ("not known", "num_hidden_layers is 'many', and a number is needed")


def test_a_base_of_the_hub_needs_no_more_than_its_config(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = planned("model.name=nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"nobody/nothing: its config\.json is not here"):
        base_to_estimate(plan)


# Disk and time --------------------------------------------------------------------------------------------------------


def test_the_disk_is_for_checkpoints_adapters_and_the_merged_model(planned: Planned) -> None:
    """An adapter of r 16 on an 8B has 41.9 million weights: 16 bytes each in a checkpoint with its best, 4 published."""
    adapter = 41_943_040
    found = {
        need.what: need.bytes for need in disk_needs(planned(), Base("base", ""), Path("run"), Path("cache"), None)
    }
    assert found["checkpoints"] == adapter * (2 * 12 + 3 * 4)  # after step 50, and at the end
    assert found["published weights"] == 2 * adapter * 4
    assert found["merged model"] == 8_030_261_248 * 2
    kept = disk_needs(planned("checkpoint.keep_published=true"), Base("base", ""), Path("run"), Path("cache"), None)
    assert {need.what: need.bytes for need in kept}["checkpoints"] == 2 * found["checkpoints"]


def test_a_speed_is_remembered_for_phases_like_it(planned: Planned, tmp_path: Path) -> None:
    plan, base, hardware = planned(), Base("base", "digest"), Hardware(1, 1, None, GB)

    def seconds(plan: Plan, base: Base = base) -> list[float | None]:
        return [each.seconds for each in phase_times(plan, base, None, tmp_path, hardware)]

    assert seconds(plan) == [None, None]
    remember_speed(plan.phases[0], base, tmp_path, steps=50, seconds=500.0)
    assert seconds(plan) == [1000.0, None]  # the second has other rows
    assert seconds(planned("lora.r=8")) == seconds(plan, replace(base, digest="another")) == [None, None]
    remember_speed(plan.phases[0], base, tmp_path, steps=2, seconds=1.0)  # too few to say anything
    assert seconds(plan) == [1000.0, None]


def test_a_memory_of_speeds_that_is_damaged_is_none(planned: Planned, tmp_path: Path) -> None:
    (tmp_path / "speeds.json").write_text("{")
    remember_speed(planned().phases[0], Base("base", ""), tmp_path, steps=50, seconds=500.0)
    assert json.loads((tmp_path / "speeds.json").read_text())


def test_a_phase_whose_data_is_not_made_has_no_time_yet(planned: Planned) -> None:
    plan = planned("phases.foundation.max_steps=null", "phases.foundation.epochs=1")
    assert "before its data is prepared" in phase_times(plan, Base("base", ""), None, Path(), gpus(1, 80 * GB))[0].from_
    loaded = load(Path("run.yaml"), ["phases.foundation.max_steps=null"])
    counted = make_plan(
        Loaded(loaded.config, loaded.places), 1, {"foundation": Prepared(blocks=10, tokens_trained=100)}
    )
    assert "yet" in phase_times(counted, Base("base", ""), None, Path(), Hardware(1, 1, None, GB))[0].from_


# The command line -----------------------------------------------------------------------------------------------------


def test_plan_tells_what_a_run_needs_of_any_hardware(planned: Planned, call: Call) -> None:
    planned(shape=QWEN3_32B)
    answer = call("plan", "-c", "run.yaml", "--fit", "--gpus", "1", "--gpu-memory", "80GB", "--host-memory", "1TB")
    assert (answer.code, answer.err) == (0, "")
    for said in (
        "foundation",
        "zero3",
        "weights 65.5 GB",
        "does not fit",
        "--set model.use_4bit=true",
        "73.7 GB of it may be used",
        "after the last phase",
    ):
        assert said in answer.out
    without = call(
        "plan", "-c", "run.yaml", "--fit", "--gpus", "1", "--gpu-memory", "80GB", "--set", "merge.enabled=false"
    )
    assert (without.code, "after the last phase" in without.out) == (0, False)


def test_the_same_facts_for_a_program(planned: Planned, call: Call) -> None:
    planned()
    answer = call("plan", "-c", "run.yaml", "--gpus", "2", "--gpu-memory", "80GB", "--json")
    fit = json.loads(answer.out)["fit"]
    assert fit["hardware"] == {
        "ranks": 2, "nodes": 1, "gpu_bytes": 80 * GB, "host_bytes": None, "room_bytes": 73_700_000_000, "host_room_bytes": None,
    }  # fmt: skip
    assert [(each["phase"], each["verdict"]) for each in fit["phases"]] == [
        ("foundation", "fits"),
        ("evolution", "fits"),
    ]
    assert sum(fit["phases"][0]["device"]["parts"].values()) == fit["phases"][0]["device"]["peak"]
    assert (fit["merge"]["verdict"], fit["merge"]["room_bytes"]) == ("not known", None)  # of a host nothing was said
    assert fit["merge"]["host"]["peak"] == sum(fit["merge"]["host"]["parts"].values()) == 4096 * 14336 * 14
    assert "fit" not in json.loads(call("plan", "-c", "run.yaml", "--json").out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu-memory", "80"), "--gpu-memory: given '80'; a size with its unit is needed: 80GB"),
        (("--gpu-memory", "much"), "--gpu-memory: given 'much'; a size is needed: 80GB"),
        (("--gpu-memory", "0GB"), "--gpu-memory: given '0GB'; more than nothing"),
        (("--gpu-memory", "80GB", "--host-memory", "-1GB"), "--host-memory: given '-1GB'"),
        (("--gpus", "8"), "--gpus 8: there is no GPU here to tell how large they are; add --gpu-memory 80GB"),
        (("--gpus", "0", "--gpu-memory", "80GB"), "--gpus"),
    ],
)
def test_hardware_that_is_written_wrongly_is_refused(
    options: tuple[str, ...], said: str, planned: Planned, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.defpath)  # where no nvidia-smi is
    planned()
    answer = call("plan", "-c", "run.yaml", "--fit", *options)
    assert answer.code == 2
    assert said in answer.err
    assert "Traceback" not in answer.err
