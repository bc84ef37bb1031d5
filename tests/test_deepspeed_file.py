"""The DeepSpeed file of a phase holds what the plan and the model say, and is refused where it says otherwise."""

import copy
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from phased_cpt.config import Loaded, Model, Phase, RunConfig, Source, Training, from_objects
from phased_cpt.config.shipped import shipped_names
from phased_cpt.deepspeed_file import ModelShape, chosen, filled, read, stage_of
from phased_cpt.errors import InputError
from phased_cpt.plan import PhasePlan, make_plan
from tests.conftest import REPOSITORY, Write

SHIPPED = shipped_names("deepspeed_configs")
PRECISIONS = ("bf16", "fp16", "fp32")
SHAPE = ModelShape(hidden_size=64)
ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}

RUN = """\
model: {name: some/model}
training:
  micro_batch_size: 2
  gradient_accumulation_steps: 3
phases: [{name: one, sources: a.jsonl}]
"""

PhaseOf = Callable[..., PhasePlan]


@pytest.fixture
def phase(loaded: Callable[..., Loaded]) -> PhaseOf:
    """The phase of the run above, on two ranks, with other values."""
    return lambda *overrides, ranks=2: make_plan(loaded(RUN, *overrides), ranks).phases[0]


@pytest.fixture
def wrong(phase: PhaseOf) -> Callable[..., list[str]]:
    """What is said against a file of a user."""

    def told(content: dict[str, Any], *overrides: str, **how: Any) -> list[str]:
        with pytest.raises(InputError) as refused:
            fill(content, phase(*overrides, **how), name="my.json")
        return str(refused.value).splitlines()

    return told


def fill(content: dict[str, Any], phase: PhasePlan, **how: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"shape": SHAPE, "name": "my.json", "on_gpu": True}
    return filled(content, phase, **usual | how)


def built(precision: Any = "bf16", ranks: int = 2, **training: Any) -> PhasePlan:
    """A phase without a file, for tests that try many."""
    phases = (Phase(name="one", sources=(Source(path="a.jsonl"),)),)
    model = Model(name="some/model", precision=precision)
    return make_plan(from_objects(RunConfig(model=model, training=Training(**training), phases=phases)), ranks).phases[
        0
    ]


def leaves(content: Any) -> Iterator[Any]:
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else None
    if inner is None:
        yield content
    for value in inner or ():
        yield from leaves(value)


# Which file -------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("T-01")
@pytest.mark.parametrize(
    ("max_tokens", "use_4bit", "fits", "name"),
    [
        (16_384, False, True, "zero2"),
        (16_384, False, None, "zero2"),
        (16_385, False, True, "zero3"),
        (16_384, False, False, "zero3"),
        (16_385, True, False, "zero2"),
    ],
)
def test_auto_shards_the_weights_where_rows_are_long_or_the_base_does_not_fit_but_never_4_bits(
    max_tokens: int, use_4bit: bool, fits: bool | None, name: str
) -> None:
    how: dict[str, Any] = {"max_tokens": max_tokens, "use_4bit": use_4bit, "fits_on_one_gpu": fits}
    assert chosen("auto", **how) == name
    assert [chosen(given, **how) for given in ("zero3_offload", "my.json")] == ["zero3_offload", "my.json"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_read_by_its_name_and_its_stage_is_the_one_that_it_is_called_by(name: str) -> None:
    assert read(name) == json.loads((REPOSITORY / f"deepspeed_configs/{name}.json").read_text())
    assert stage_of(read(name)) == int(name[4])


@pytest.mark.parametrize(
    ("stage", "number"), [(3, 3), (3.0, 3), (1, 1), (0, 0), (True, 0), ("3", 0), ("auto", 0), (4, 0), (None, 0)]
)
def test_a_stage_is_a_number(stage: Any, number: int) -> None:
    assert stage_of({"zero_optimization": {"stage": stage}}) == number
    assert stage_of({}) == stage_of({"zero_optimization": True}) == 0


def test_a_file_of_ones_own_is_read_by_its_path_with_a_byte_order_mark_or_without(write: Write) -> None:
    write('{"a": 1}', "sub/my.json")
    write(b'\xef\xbb\xbf{"a": 2}', "other.json")
    assert (read("sub/my.json"), read("other.json")) == ({"a": 1}, {"a": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": 2, // why\n}',
         "my.json:2: not valid JSON: expecting property name enclosed in double quotes (column 10); JSON has no comments "
         "and no trailing commas"),
        ("", "my.json:1: not valid JSON: expecting value (column 1); JSON has no comments and no trailing commas"),
        ('{"z": {"stage": 2, "stage": 3}}',
         'my.json: not valid JSON: "stage" stands twice in one object; keep one of them'),
        ('{"steps_per_print": Infinity}', "my.json: not valid JSON: Infinity is no number there; write a finite one"),
        ("[1]", 'my.json: an object is needed, {"zero_optimization": {"stage": 2}} at least'),
        ("[" * 100_000, "my.json: nested too deeply"),
        (b'{"a": "\xff"}', "my.json: byte 7 is not UTF-8; save the file as UTF-8"),
    ],
    ids=["a comment", "empty", "a key twice", "infinity", "a list", "deep", "not UTF-8"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_told_with_its_path_as_typed(
    write: Write, text: str | bytes, message: str
) -> None:
    write(text, "my.json")
    with pytest.raises(InputError) as refused:
        read("my.json")
    assert str(refused.value) == message


def test_a_file_that_is_not_there_is_told_with_what_to_type(write: Write) -> None:
    here = write("").resolve().parent
    (here / "folder.json").mkdir()
    names = "zero2, zero2_offload, zero3, zero3_offload"
    for name, message in {
        "./mine.json": f"./mine.json: no such file (looked from {here}); give another path, or the name of a shipped "
        f"one: {names}",
        "zero4": f"training.deepspeed: given 'zero4'; allowed: {names}, or the path of a .json file; did you mean zero3?",
        "folder.json": "folder.json: cannot be read: Is a directory",
        "a\0.json": "a\0.json: cannot be read: embedded null byte",
    }.items():
        with pytest.raises(InputError) as refused:
            read(name)
        assert str(refused.value) == message


# What is filled in ------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("T-01")
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_filled_file_leaves_nothing_auto_and_the_file_itself_as_it_was(name: str, precision: str, ranks: int) -> None:
    content = read(name)
    result = fill(content, built(precision, ranks))
    assert "auto" in leaves(content)
    assert "auto" not in leaves(result)
    assert content == read(name)
    micro, steps = result["train_micro_batch_size_per_gpu"], result["gradient_accumulation_steps"]
    assert (micro, steps, result["train_batch_size"]) == (1, 6, 6 * ranks)
    assert (result["bf16"]["enabled"], result["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
    assert ("initial_scale_power" in result["fp16"]) == (precision == "fp16")
    assert stage_of(result) == stage_of(content)


def test_a_file_that_names_its_stage_alone_becomes_a_whole_one() -> None:
    assert fill(ZERO2, built("fp16", max_grad_norm=None)) == {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 6,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": False},
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
    }


def test_what_the_plan_does_not_decide_is_left_as_the_user_wrote_it() -> None:
    own = {
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 5e8,
            "stage3_max_live_parameters": 1,
            "sub_group_size": 7,
        },
        "fp16": {"enabled": "auto", "loss_scale": 128, "hysteresis": "auto"},
        "steps_per_print": 10,
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": False,
        "flops_profiler": {"enabled": False},
    }
    result = fill(own, built("fp16"))
    assert result["zero_optimization"] == own["zero_optimization"]
    assert (result["fp16"]["loss_scale"], result["fp16"]["hysteresis"]) == (128, 2)
    assert fill(own, built("bf16"))["fp16"] == {"enabled": False, "loss_scale": 128, "hysteresis": 2}
    same = {"steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "flops_profiler"}
    assert {key: result[key] for key in same} == {key: own[key] for key in same}
    assert result["zero_optimization"] is not own["zero_optimization"]


def test_a_bucket_holds_a_matrix_of_the_model_and_deepspeed_gets_an_even_number() -> None:
    auto = {"stage": 3, **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), "auto")}
    for hidden, reduce, allgather in ((4096, 16_777_216, 16_777_216), (63, 3969, 3970)):
        zero = fill({"zero_optimization": auto}, built(), shape=ModelShape(hidden))["zero_optimization"]
        assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (reduce, allgather)


@pytest.mark.parametrize(
    ("zero", "asked"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, True),
        ({"cpu_offload": True}, True),
        ({"offload_optimizer": {"device": "none"}}, False),
        ({"offload_optimizer": None}, False),
        ({}, False),
    ],
)
def test_an_offloaded_optimizer_is_the_plans_not_the_one_that_would_be_put_in_its_place(
    wrong: Callable[..., list[str]], zero: dict[str, Any], asked: bool
) -> None:
    content = {"zero_optimization": {"stage": 2, **zero}}
    assert fill(content, built()).get("zero_force_ds_cpu_optimizer") == (False if asked else None)
    forced = content | {"zero_force_ds_cpu_optimizer": True}
    if not asked:
        assert fill(forced, built())["zero_force_ds_cpu_optimizer"] is True, "it decides nothing there"
        return
    assert wrong(forced, "training.optimizer=adafactor") == [
        "my.json: zero_force_ds_cpu_optimizer is true, and training.optimizer is adafactor (command line): DeepSpeedCPUAdam "
        "would take its place; write false"
    ]


COUNTS = some.integers(1, 64)


@given(
    name=some.sampled_from(SHIPPED),
    precision=some.sampled_from(PRECISIONS),
    ranks=COUNTS,
    batch=some.fixed_dictionaries({"micro_batch_size": COUNTS, "gradient_accumulation_steps": COUNTS}),
    norm=some.none() | some.floats(0.001, 100),
    hidden=some.integers(1, 20_000),
    absent=some.sets(some.sampled_from(["train_batch_size", "gradient_clipping", "bf16", "fp16"])),
)
def test_any_plan_fills_any_file_and_a_file_that_is_filled_agrees_with_its_plan(
    name: str, precision: str, ranks: int, batch: dict[str, int], norm: float | None, hidden: int, absent: set[str]
) -> None:
    content = {key: value for key, value in read(name).items() if key not in absent}
    before, phase, shape = (
        copy.deepcopy(content),
        built(precision, ranks, max_grad_norm=norm, **batch),
        ModelShape(hidden),
    )
    result = fill(content, phase, shape=shape)
    assert content == before
    assert "auto" not in leaves(result)
    assert result["train_batch_size"] == batch["micro_batch_size"] * batch["gradient_accumulation_steps"] * ranks
    assert fill(result, phase, shape=shape) == result
    with pytest.raises(InputError, match="train_batch_size"):
        fill(result, built(precision, ranks + 1, max_grad_norm=norm, **batch), shape=shape)


def test_a_plan_that_does_not_know_its_ranks_fills_nothing(phase: PhaseOf) -> None:
    with pytest.raises(ValueError, match="number of ranks"):
        fill(ZERO2, phase(ranks=None))


# What is refused --------------------------------------------------------------------------------------------------------

AGREE = 'make them agree, or write "auto" in my.json'


@pytest.mark.parametrize(
    ("own", "overrides", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, [],
         f"train_micro_batch_size_per_gpu is 4, and training.micro_batch_size is 2 (run.yaml:3); {AGREE}"),
        ({"train_micro_batch_size_per_gpu": True}, ["training.micro_batch_size=1"],
         f"train_micro_batch_size_per_gpu is true, and training.micro_batch_size is 1 (command line); {AGREE}"),
        ({"gradient_accumulation_steps": 1}, [],
         f"gradient_accumulation_steps is 1, and training.gradient_accumulation_steps is 3 (run.yaml:4); {AGREE}"),
        ({"gradient_accumulation_steps": 3}, ["training.global_batch_size=8"],
         "gradient_accumulation_steps is 3, and training.global_batch_size is 8 (command line) and training.micro_batch_size is "
         f"2 (run.yaml:3): 2 steps on 2 ranks; {AGREE}"),
        ({"train_batch_size": 6}, [],
         "train_batch_size is 6, and training.micro_batch_size is 2 (run.yaml:3) and training.gradient_accumulation_steps "
         f"is 3 (run.yaml:4): 12 rows on 2 ranks; {AGREE}"),
        ({"train_batch_size": 12}, ["phases.one.training.global_batch_size=8"],
         f"train_batch_size is 12, and training.global_batch_size is 8 (command line); {AGREE}"),
        ({"gradient_clipping": 0.5}, [],
         f"gradient_clipping is 0.5, and training.max_grad_norm is 1.0 (default); {AGREE}"),
        ({"gradient_clipping": None}, [],
         f"gradient_clipping is null, and training.max_grad_norm is 1.0 (default); {AGREE}"),
        ({"gradient_clipping": 1.0}, ["training.max_grad_norm=null"],
         f"gradient_clipping is 1.0, and training.max_grad_norm is null (command line); {AGREE}"),
        ({"bf16": {"enabled": False}}, [], f"bf16.enabled is false, and model.precision is bf16 (default); {AGREE}"),
        ({"fp16": {"enabled": True}}, [], f"fp16.enabled is true, and model.precision is bf16 (default); {AGREE}"),
        ({"bf16": {"enabled": 1}}, [], f"bf16.enabled is 1, and model.precision is bf16 (default); {AGREE}"),
        ({"bf16": True}, [], "bf16 is true; an object is needed, as in deepspeed_configs/zero2_offload.json"),
        ({"zero_optimization": True}, [],
         "zero_optimization is true; an object is needed, as in deepspeed_configs/zero2_offload.json"),
        ({"zero_optimization": {"stage": 1}}, [],
         "zero_optimization.stage is 1; write 2, or 3 to shard the weights, too"),
        ({"zero_optimization": {"stage": "auto"}}, [],
         'zero_optimization.stage is "auto"; write 2, or 3 to shard the weights, too'),
        ({"zero_optimization": {}}, [], "zero_optimization.stage is absent; write 2, or 3 to shard the weights, too"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, [],
         "optimizer: the plan decides it: take it out, and use training.optimizer, learning_rate and weight_decay"),
        ({"scheduler": {"type": "WarmupLR"}}, [],
         "scheduler: the plan decides it: take it out, and use training.lr_scheduler, warmup_ratio and min_lr_ratio"),
        ({"bfloat16": {"enabled": True}}, [],
         "bfloat16: an old name, at which DeepSpeed does not look beside bf16: write it bf16"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, [],
         "zero_optimization.offload_optimizer.device is nvme, of which no checkpoint can be made; write cpu"),
        ({"zero_optimization": {"stage": 0}}, [],
         "zero_optimization.stage is 0, and model.precision is bf16 (default): without ZeRO there are no fp32 weights beside "
         "them to learn with; write 2"),
        ({"sequence_parallel_size": 2}, [],
         "sequence_parallel_size: in the plan every rank has rows of its own, so ranks cannot share one: take it out"),
        ({"data_types": {"keep_in_fp32_modules": "auto"}}, [],
         'data_types.keep_in_fp32_modules is "auto", and nothing in the plan fills it; write a value, or take it out'),
        ({"list": [{"x": "auto"}]}, [],
         'list.0.x is "auto", and nothing in the plan fills it; write a value, or take it out'),
    ],
)  # fmt: skip
def test_what_contradicts_the_plan_is_told_with_both_sides_and_both_places(
    wrong: Callable[..., list[str]], own: dict[str, Any], overrides: list[str], message: str
) -> None:
    assert wrong(ZERO2 | own, *overrides) == [f"my.json: {message}"]


def test_what_agrees_with_the_plan_may_be_written_out(phase: PhaseOf) -> None:
    own: dict[str, Any] = {
        "train_batch_size": 12.0,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
    }
    own |= {"gradient_clipping": 1, "bf16": {"enabled": True}, "fp16": {"enabled": False}}
    assert fill(ZERO2 | own, phase()) == fill(ZERO2, phase())
    assert fill(ZERO2 | {"gradient_clipping": None}, phase("training.max_grad_norm=null"))["gradient_clipping"] == 0.0


def test_all_that_is_wrong_is_told_at_once(wrong: Callable[..., list[str]]) -> None:
    own = {
        "zero_optimization": {"stage": 0, "x": "auto"},
        "train_batch_size": 1,
        "scheduler": {},
        "bf16": {"enabled": 0},
    }
    keys = ["train_batch_size", "bf16.enabled", "zero_optimization.stage", "scheduler", "zero_optimization.x"]
    assert [line.removeprefix("my.json: ").split()[0].rstrip(":") for line in wrong(own)] == keys


def test_zero_3_shards_4_bit_weights_only_as_precision(phase: PhaseOf) -> None:
    plain = phase("model.use_4bit=true")
    other = replace(plain, model=plain.model.model_copy(update={"bnb_4bit_quant_storage": "uint8"}))
    with pytest.raises(InputError, match=r"bnb_4bit_quant_storage is uint8 .* and model.precision is bf16 \(default\)"):
        fill(read("zero3"), other)
    for content, right in ((read("zero3"), plain), (read("zero2"), other)):
        assert "auto" not in leaves(fill(content, right))


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(InputError, match=r"model.precision is fp16 \(Python\), which DeepSpeed refuses without a GPU"):
        fill(ZERO2, built("fp16"), on_gpu=False)
    assert fill(ZERO2, built("bf16"), on_gpu=False) == fill(ZERO2, built("bf16"), on_gpu=True)


# What the others make of it ---------------------------------------------------------------------------------------------

CHILD = """
import copy, json, os, sys
from types import SimpleNamespace
answers, out = [], os.dup(1)
os.dup2(2, 1)  # what they print is not the answer
import deepspeed.runtime.config as theirs
from accelerate.utils import DeepSpeedPlugin
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

theirs.dist.get_rank = lambda: 0  # without it, it takes itself to be alone, whatever mpu says

def deepspeed(content, ranks):
    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: ranks)
    config = theirs.DeepSpeedConfig(copy.deepcopy(content), mpu=mpu)
    return [config.train_batch_size, config.world_size, config.zero_optimization_stage, config.gradient_clipping]

def transformers(content, ranks, precision, hidden):
    config = HfTrainerDeepSpeedConfig(content)
    config.trainer_config_process(SimpleNamespace(
        world_size=ranks, per_device_train_batch_size=1, gradient_accumulation_steps=6, max_grad_norm=1.0,
        learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.1,
        save_on_each_node=False, fp16=precision == "fp16", fp16_full_eval=False, bf16=precision == "bf16",
        bf16_full_eval=False, get_warmup_steps=lambda steps: 1))
    config.trainer_config_finalize(SimpleNamespace(get_warmup_steps=lambda steps: 1),
                                   SimpleNamespace(config=SimpleNamespace(hidden_size=hidden)), 10)
    return config.config

def accelerate(content, ranks, precision):
    plugin = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(content))
    plugin.set_mixed_precision(precision.replace("fp32", "no"))
    plugin.deepspeed_config_process(must_match=False)
    return plugin.deepspeed_config

def tried(program, *given):
    try:
        return program(*given)
    except (AssertionError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

for case in json.load(sys.stdin):
    content, ranks, precision, hidden = case
    between = tried(transformers, content, ranks, precision, hidden)
    # As in the Trainer, accelerate is given what transformers made of it.
    last = tried(accelerate, between if isinstance(between, dict) else content, ranks, precision)
    answers.append([tried(deepspeed, content, ranks), between, last])
with os.fdopen(out, "w") as answer:
    json.dump(answers, answer)
"""


def answers_of_the_others(cases: list[tuple[Any, ...]]) -> list[list[Any]]:
    """In a child: to import deepspeed takes seconds, and it stays."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(cases),
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)  # type: ignore[no-any-return]


def test_deepspeed_transformers_and_accelerate_take_what_is_filled_and_find_nothing_to_fill() -> None:
    made = {
        (name, precision, ranks): fill(read(name), built(precision, ranks), shape=ModelShape(63))
        for name, precision, ranks in itertools.product(SHIPPED, PRECISIONS, (1, 2, 8))
    }
    cases = [(file, ranks, precision, 63) for (_, precision, ranks), file in made.items()]
    controls = [(read("zero2"), 2, "bf16", 63), (read("zero3"), 2, "bf16", 63)]
    controls += [(made["zero2", "bf16", 2] | {"train_batch_size": 7}, 2, "bf16", 63)]
    *answers, raw2, raw3, other = answers_of_the_others(cases + controls)
    for ((name, _, ranks), file), (deepspeed, transformers, accelerate) in zip(made.items(), answers, strict=True):
        assert deepspeed == [6 * ranks, ranks, stage_of(read(name)), 1.0]
        assert transformers == file
        assert accelerate == file | {"steps_per_print": float("inf")}
    # What is not filled, or filled otherwise, they would fill or refuse; and the sizes are those of transformers.
    assert raw2[1]["zero_optimization"]["allgather_bucket_size"] == "auto"
    assert "`zero_optimization.allgather_bucket_size` not found" in raw2[2]
    assert raw3[1] == {key: value for key, value in made["zero3", "bf16", 2].items() if key in read("zero3")}
    assert raw2[0].startswith("TypeError"), "an auto outside a block, at which it stumbles"
    assert "train_batch_size is not equal" in other[0]
    assert "ds train_batch_size=7 vs hf train_batch_size (calculated)=12" in other[1]
