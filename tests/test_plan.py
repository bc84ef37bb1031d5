"""A configuration becomes a plan: what holds in each phase, and where it came from."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from phased_cpt.config import Loaded, RunConfig
from phased_cpt.errors import InputError
from phased_cpt.plan import Origin, Plan, _warnings, make_plan
from phased_cpt.schedule import Batch, Prepared
from tests.config.test_schema import fields
from tests.conftest import MINIMAL

Load = Callable[..., Loaded]

CURRICULUM = """\
    model: {name: some/model}
    training: {weight_decay: 0.2, learning_rate: 1e-3}
    lora: {r: 4, alpha: 8}
    phases:
      - {name: foundation, sources: a.jsonl, max_steps: 200}
      - name: evolution
        sources: b.jsonl
        epochs: 2
        training: {learning_rate: 5e-5}
        data: {max_tokens: 4096}
"""


@pytest.fixture
def plan(loaded: Load) -> Callable[..., Plan]:
    return lambda text, *overrides, **known: make_plan(loaded(text, *overrides), **known)


def test_a_phase_has_its_own_values_and_the_runs_for_the_rest(plan: Callable[..., Plan]) -> None:
    foundation, evolution = plan(CURRICULUM).phases
    assert (foundation.settings.training.learning_rate, evolution.settings.training.learning_rate) == (1e-3, 5e-5)
    assert (foundation.settings.training.weight_decay, evolution.settings.training.weight_decay) == (0.2, 0.2)
    assert (foundation.settings.data.max_tokens, evolution.settings.data.max_tokens) == (32768, 4096)
    assert evolution.settings.lora.r == 4


@pytest.mark.parametrize(
    ("overrides", "section", "key", "foundation", "evolution"),
    [
        ([], "training", "weight_decay", Origin("file", "run.yaml:2"), Origin("file", "run.yaml:2")),
        ([], "training", "learning_rate", Origin("file", "run.yaml:2"), Origin("phase", "run.yaml:9")),
        ([], "training", "optimizer", Origin("default"), Origin("default")),
        ([], "data", "max_tokens", Origin("default"), Origin("phase", "run.yaml:10")),
        (["training.weight_decay=0"], "training", "weight_decay", Origin("command line"), Origin("command line")),
        # A phase's own value is nearer than the run's, wherever the run's came from.
        (["training.learning_rate=1"], "training", "learning_rate", Origin("command line"), Origin("phase", "run.yaml:9")),
        (["phases.1.training.learning_rate=1"], "training", "learning_rate", Origin("file", "run.yaml:2"),
         Origin("command line")),
        (["phases.1.training={learning_rate: 1}"], "training", "learning_rate", Origin("file", "run.yaml:2"),
         Origin("command line")),
    ],
)  # fmt: skip
def test_each_value_knows_where_it_came_from(
    plan: Callable[..., Plan], overrides: list[str], section: str, key: str, foundation: Origin, evolution: Origin
) -> None:
    assert [phase.origins[section, key] for phase in plan(CURRICULUM, *overrides).phases] == [foundation, evolution]


def test_an_overlap_that_nobody_gave_shrinks_with_the_window(plan: Callable[..., Plan]) -> None:
    text = "model: {name: m}\nphases: [{name: a, sources: x}, {name: b, sources: x, data: {max_tokens: 512}}]"
    overlaps = [phase.settings.data.overlap_tokens for phase in plan(text).phases]
    given = [phase.settings.data.overlap_tokens for phase in plan(text, "data.overlap_tokens=100").phases]
    assert (overlaps, given) == ([2048, 32], [100, 100])
    assert plan(text).phases[1].origins["data", "overlap_tokens"] == Origin("default")
    assert "data.overlap_tokens" in plan(text).phases[1].values("recipe")


@pytest.mark.parametrize(
    ("phases", "starts"),
    [
        ("[{name: a, sources: x}, {name: b, sources: x}, {name: c, sources: x}]",
         [("some/model", True), ("a's adapter", False), ("b's adapter", False)]),
        ("[{name: a, sources: x, handover: merge}, {name: b, sources: x}]", [("some/model", True), ("a, merged", True)]),
        ("[{name: a, sources: x, lora: {enabled: false}}, {name: b, sources: x}]",
         [("some/model", False), ("the base that a trained", True)]),
    ],
)  # fmt: skip
def test_each_phase_starts_from_what_the_one_before_published(
    plan: Callable[..., Plan], phases: str, starts: list[tuple[str, bool]]
) -> None:
    planned = plan(f"model: {{name: some/model}}\nphases: {phases}")
    assert [(str(phase.start), phase.fresh_adapter) for phase in planned.phases] == starts


def test_the_first_phase_may_start_from_a_given_adapter(plan: Callable[..., Plan]) -> None:
    first = plan("model: {name: m, adapter: old/adapter}\nphases: [{name: a, sources: x}]").phases[0]
    assert (str(first.start), first.fresh_adapter) == ("m + old/adapter", False)


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ("", (1, "epochs")),
        (", epochs: 3", (3, "epochs")),
        (", epochs: 3, tokens: 5_000", (5000, "tokens")),
        (", epochs: 3, tokens: 5_000, max_steps: 7", (7, "steps")),
    ],
)
def test_the_budget_that_rules(plan: Callable[..., Plan], given: str, budget: tuple[float, str]) -> None:
    phase = plan(f"model: {{name: m}}\nphases: [{{name: a, sources: x{given}}}]").phases[0]
    assert (phase.budget.amount, phase.budget.unit) == budget


def test_steps_and_schedule_are_known_once_the_data_is(plan: Callable[..., Plan]) -> None:
    before = plan(CURRICULUM, ranks=2)
    assert [phase.steps for phase in before.phases] == [200, None]
    assert before.phases[1].schedule is None
    after = plan(CURRICULUM, ranks=2, prepared={"evolution": Prepared(blocks=600, tokens_trained=10**6)})
    assert after.phases[1].steps == 100  # 2 × 600 rows in batches of 12
    assert after.phases[1].schedule is not None
    assert (after.phases[1].schedule.warmup_steps, after.phases[1].schedule.peak) == (3, 5e-5)


def test_the_batch_follows_from_the_number_of_ranks(plan: Callable[..., Plan]) -> None:
    assert plan(MINIMAL).phases[0].batch is None
    assert plan(MINIMAL, "launch.num_gpus=8").phases[0].batch == Batch(48, 1, 6, 8)
    assert plan(MINIMAL, ranks=4).phases[0].batch == Batch(24, 1, 6, 4)
    assert plan(MINIMAL, "training.global_batch_size=64", ranks=4).phases[0].batch == Batch(64, 1, 16, 4)
    assert plan(MINIMAL, "training.global_batch_size=64").phases[0].global_rows == 64
    with pytest.raises(InputError, match=r"training\.global_batch_size: 64 rows cannot be shared by 5 ranks"):
        plan(MINIMAL, "training.global_batch_size=64", ranks=5)


def recipe(plan: Plan, name: str = "evolution") -> dict[str, Any]:
    return plan.phase(name).values("recipe")


# The keys that may change under a phase that has begun; every other key of the schema is refused. A new key belongs to
# the recipe until it is put here.
FREE = [
    "run.name",
    "run.output_dir",
    "run.dir",
    "run.cache_dir",
    "model.name",
    "model.revision",
    "model.tokenizer",
    "model.adapter",
    "model.attention",
    "model.bnb_4bit_quant_storage",
    "model.trust_remote_code",
    "data.isolate_documents",
    "data.tokenizer_backend",
    "data.max_bad_share",
    "data.max_repeats",
    "training.micro_batch_size",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "training.loss",
    "training.deepspeed",
    "evaluation.micro_batch_size",
    "evaluation.matrix",
    "evaluation.general",
    "evaluation.samples",
    "tracking.wandb.enabled",
    "tracking.wandb.project",
    "tracking.wandb.entity",
    "tracking.wandb.mode",
    "tracking.tensorboard.enabled",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_published",
    "merge.enabled",
    "merge.output_dir",
    "merge.max_shard_size",
    "merge.base",
    "merge.dtype",
    "launch.num_gpus",
    "launch.nnodes",
    "launch.master_addr",
    "launch.master_port",
    "launch.hostfile",
    "launch.hang_minutes",
    "launch.launcher",
    "launch.retries",
    "phases.description",
    "phases.gate",
    "phases.gate.max_forgetting",
    "phases.gate.min_gain",
    "phases.gate.on_fail",
    "phases.gate.replay",
    "phases.sources.path",
    "phases.eval_sources.path",
]
# What no key says, and several decide.
DECIDED = ("training.warms_up", "training.anneals")
# Keys that the recipe holds in another form.
IN_ANOTHER_FORM = dict.fromkeys(("phases.max_steps", "phases.tokens", "phases.epochs"), "budget") | {
    f"phases.{sources}.{key}": sources for sources in ("sources", "eval_sources") for key in ("split", "weight")
}


def test_every_key_is_free_or_in_the_recipe(plan: Callable[..., Plan]) -> None:
    classes = {
        path: str(field.json_schema_extra["change"])  # type: ignore[index,call-overload]
        for path, field in fields()
        if not path.startswith(tuple(f"phases.{section}" for section in ("lora", "data", "training", "evaluation")))
        and path.rpartition(".")[2] not in type(RunConfig()).model_fields
        and path not in ("tracking.wandb", "tracking.tensorboard")
        and not path.startswith("evaluation.general.")  # of what is never trained
    }
    assert sorted(path for path, kind in classes.items() if kind != "recipe") == sorted(FREE)
    # A phase in which every key decides something.
    full = plan(
        CURRICULUM, "training.lr_scheduler=infinite", "data.on_bad_record=skip", "model.name=null",
        "model.from_config={model_type: llama}", "training.global_batch_size=8", "evaluation.patience=3",
        "phases.evolution.training.learning_rate=1e-3", "data.temperature=2",
    )  # fmt: skip
    recipes = full.phases[0].values("recipe") | full.phases[1].values("recipe")
    recipes |= plan(CURRICULUM, "training.warmup_steps=3").phases[1].values("recipe")
    recipes = {key: value for key, value in recipes.items() if key not in DECIDED}
    expected = {IN_ANOTHER_FORM.get(path, path.removeprefix("phases.")) for path in classes if path not in FREE}
    assert sorted(recipes) == sorted(expected)


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1", "model.precision=fp32", "lora.dropout=0.1", "data.packing=pad", "training.max_grad_norm=null",
        "phases.evolution.epochs=3", "phases.evolution.max_steps=9", "phases.evolution.training.learning_rate=1e-5",
        "phases.evolution.sources=[{path: b.jsonl, weight: 2}]", "phases.evolution.replay=0.1",
        "training.gradient_accumulation_steps=7", "launch.num_gpus=3", "phases.foundation.handover=merge",
    ],
)  # fmt: skip
def test_what_moves_the_result_is_in_the_recipe(plan: Callable[..., Plan], override: str) -> None:
    assert recipe(plan(CURRICULUM, "launch.num_gpus=2", override)) != recipe(plan(CURRICULUM, "launch.num_gpus=2"))


@pytest.mark.parametrize(
    "override",
    ["model.name=moved/model", "training.deepspeed=zero3", "phases.evolution.sources=moved.jsonl",
     "phases.foundation.training={learning_rate: 1e-5}", "phases.evolution.description=other"],
)  # fmt: skip
def test_what_does_not_is_not(plan: Callable[..., Plan], override: str) -> None:
    assert recipe(plan(CURRICULUM, override)) == recipe(plan(CURRICULUM))


def test_an_adapter_that_goes_on_has_the_values_and_the_origins_of_the_phase_that_began_it(
    plan: Callable[..., Plan],
) -> None:
    text = """\
    model: {name: m}
    lora: {r: 4, alpha: 8}
    phases:
      - {name: a, sources: x, lora: {r: 16}}
      - {name: b, sources: x, handover: merge, lora: {dropout: 0.1}}
      - {name: c, sources: x}
    """
    phases = plan(text).phases
    assert [phase.settings.lora.r for phase in phases] == [16, 16, 4]
    assert [phase.origins["lora", "r"] for phase in phases] == [
        Origin("phase", "run.yaml:4"), Origin("phase", "run.yaml:4"), Origin("file", "run.yaml:2"),
    ]  # fmt: skip
    assert phases[1].origins["lora", "dropout"] == Origin("phase", "run.yaml:5")


INFINITE = """\
    model: {name: m}
    training: {lr_scheduler: infinite, learning_rate: 1e-3, min_lr_ratio: 0.1}
    phases:
      - {name: a, sources: x, max_steps: 100}
      - {name: b, sources: x, max_steps: 100}
      - {name: c, sources: x, max_steps: 100}
"""


@pytest.mark.requirement("T-02")
@pytest.mark.parametrize(
    ("overrides", "ends"),
    [
        ([], [(2.5e-4, 5e-4), (5e-4, 5e-4), (5e-4, 1e-4)]),
        # Where another shape, or an adapter that is fresh, comes between, a row ends and another begins.
        (["phases.b.training={lr_scheduler: wsd}"], [(2.5e-4, 1e-4), (2.5e-4, 1e-4), (2.5e-4, 1e-4)]),
        (["phases.a.handover=merge"], [(2.5e-4, 1e-4), (2.5e-4, 5e-4), (5e-4, 1e-4)]),
        (["phases.b.handover=stack"], [(2.5e-4, 5e-4), (5e-4, 1e-4), (2.5e-4, 1e-4)]),
        (["lora.enabled=false"], [(2.5e-4, 5e-4), (5e-4, 5e-4), (5e-4, 1e-4)]),
        (["phases.a.lora={enabled: false}"], [(2.5e-4, 1e-4), (2.5e-4, 5e-4), (5e-4, 1e-4)]),
    ],
)
def test_infinite_goes_on_from_phase_to_phase_where_the_weights_do(
    plan: Callable[..., Plan], overrides: list[str], ends: list[tuple[float, float]]
) -> None:
    """The rate at the first step of each phase, and behind its last."""
    schedules = [phase.schedule for phase in plan(INFINITE, *overrides).phases]
    assert [(each.rate(0), each.rate(100)) for each in schedules if each] == [pytest.approx(pair) for pair in ends]


def test_a_phase_behind_infinite_changes_how_the_one_before_ended(plan: Callable[..., Plan]) -> None:
    """So that it cannot be added unsaid: that phase went down in its last steps, and now it would not have."""
    alone = recipe(plan(INFINITE.replace("      - {name: c, sources: x, max_steps: 100}\n", "")), "b")
    followed = recipe(plan(INFINITE), "b")
    assert {key for key in alone if alone[key] != followed.get(key)} == {
        "training.anneals", "training.decay_ratio", "training.min_lr_ratio",
    }  # fmt: skip
    other = INFINITE.replace("{name: c,", "{training: {lr_scheduler: wsd}, name: c,")
    assert recipe(plan(other), "b") == alone, "the control: behind another shape it is free"


@pytest.mark.parametrize(
    ("given", "decides"),
    [
        ("training.cooldown_ratio=0.3", "training.lr_scheduler=infinite"),
        ("training.constant_ratio=0.3", "training.lr_scheduler=infinite"),
        ("training.decay_ratio=0.3", "training.lr_scheduler=wsd"),
        ("evaluation.cooldown_ratio=0.3", "evaluation.patience=3"),
        ("training.lora_plus_ratio=4", "lora.enabled=true"),
        ("lora.init=gaussian", "lora.enabled=true"),
        ("lora.use_dora=true", "lora.enabled=true"),
    ],
)
def test_a_key_that_decides_nothing_is_not_in_the_recipe(plan: Callable[..., Plan], given: str, decides: str) -> None:
    silent = "lora.enabled=false" if decides == "lora.enabled=true" else "run.name=other"
    assert recipe(plan(MINIMAL, silent, given), "foundation") == recipe(plan(MINIMAL, silent), "foundation")
    assert recipe(plan(MINIMAL, decides, given), "foundation") != recipe(plan(MINIMAL, decides), "foundation")


def test_how_an_adapter_was_drawn_is_the_business_of_the_phase_that_drew_it(plan: Callable[..., Plan]) -> None:
    keys = [phase.values("recipe").get("lora.init") for phase in plan(MINIMAL, "lora.init=gaussian").phases]
    assert keys == ["gaussian", None]


def test_a_set_that_reaches_no_phase_is_told(plan: Callable[..., Plan]) -> None:
    text = CURRICULUM.replace("max_steps: 200}", "max_steps: 200, training: {learning_rate: 1e-3}}")
    assert plan(text, "training.learning_rate=7e-3").warnings() == [
        "--set training.learning_rate reaches no phase: each has its own"
    ]
    assert plan(CURRICULUM, "training.learning_rate=7e-3").warnings() == []


def test_a_warm_up_longer_than_the_phase_is_cut_short_of_it(plan: Callable[..., Plan]) -> None:
    short = plan(CURRICULUM, "training.warmup_steps=50", ranks=1, prepared={"evolution": Prepared(12, 100)})
    schedule = short.phase("evolution").schedule
    assert schedule is not None
    assert (schedule.steps, schedule.warmup_steps) == (4, 3)


def test_the_same_global_batch_is_the_same_recipe_however_it_is_made_up(plan: Callable[..., Plan]) -> None:
    eight = plan(CURRICULUM, "training.global_batch_size=48", "launch.num_gpus=8")
    two = plan(CURRICULUM, "training.global_batch_size=48", "launch.num_gpus=2", "training.micro_batch_size=4")
    by_hand = plan(CURRICULUM, "training.gradient_accumulation_steps=6", "launch.num_gpus=8")
    assert recipe(eight) == recipe(two) == recipe(by_hand)
    assert eight.phases[1].values("execution") != two.phases[1].values("execution")


def test_an_overruled_budget_is_not_in_the_recipe(plan: Callable[..., Plan]) -> None:
    steps = plan(CURRICULUM, "phases.evolution.max_steps=10")
    assert recipe(steps) == recipe(plan(CURRICULUM, "phases.evolution.max_steps=10", "phases.evolution.epochs=9"))


def test_a_plan_warns_of_what_is_allowed_and_yet_odd(plan: Callable[..., Plan]) -> None:
    assert plan(CURRICULUM).warnings() == []
    odd = ("lora.alpha=64", "phases.foundation.max_steps=40", "phases.foundation.epochs=2", "training.warmup_steps=50")
    batch = ("training.gradient_accumulation_steps=2", "training.global_batch_size=8", "launch.num_gpus=1")
    known = plan(CURRICULUM, *odd[:3], *batch, prepared={"evolution": Prepared(blocks=100, tokens_trained=10**6)})
    also = plan(CURRICULUM, odd[3], *batch, prepared={"evolution": Prepared(blocks=100, tokens_trained=10**6)})
    told = [
        "foundation: fewer than 100 optimizer steps; a larger budget would give more",
        "foundation, evolution: evaluation.every_steps is 50, longer than the phase: evaluated at the ends of its epochs only",
        "foundation: max_steps is its budget, so epochs is not used",
        "foundation, evolution: the adapter is scaled by 16 (alpha / r); 2 is usual",
        "foundation, evolution: training.global_batch_size rules, so gradient_accumulation_steps is not used as given",
        "evolution: fewer than 100 optimizer steps; a smaller batch or a larger budget would give more",
    ]
    random = "foundation: an adapter on random weights learns little; let a phase before train every weight (lora.enabled: false)"
    long_warmup = "evolution: training.warmup_steps is 50, longer than the phase; it is cut to all steps but one"
    assert known.warnings() == told
    assert long_warmup in also.warnings()
    assert plan(CURRICULUM, "model.name=null", "model.from_config=c.json").warnings() == [random]
    wide = plan(CURRICULUM, "data.max_tokens=64", "data.overlap_tokens=40").warnings()[0]
    assert wide.startswith("foundation: data.overlap_tokens is 40 of max_tokens 64, so that long documents")
    (fast,) = plan(CURRICULUM, "training.lora_plus_ratio=16", "phases.evolution.training.learning_rate=1e-4").warnings()
    assert fast == "foundation: B learns at 0.016 (learning_rate × lora_plus_ratio); above 0.005 few models learn"
    (drawn,) = plan(CURRICULUM, "lora.init=orthogonal").warnings()
    assert drawn.startswith("foundation: lora.init: in bf16 an orthogonal adapter begins as about 1 % of the weights")
    assert plan(CURRICULUM, "lora.init=orthogonal", "model.precision=fp32").warnings() == []
    gate = "phases.evolution.gate={min_gain: 0, on_fail: retry_with_replay}"
    (twice,) = plan(CURRICULUM, gate, "phases.evolution.replay=0.1").warnings()
    assert twice.startswith("evolution: gate.on_fail is retry_with_replay, and it replays already")
    assert plan(CURRICULUM, gate).warnings() == []
    # One of them is told in two forms.
    assert len({*told, long_warmup, random, wide, fast, drawn, twice}) - 1 == inspect.getsource(_warnings).count(
        "yield "
    ), "every warning is told here"


def test_a_plan_says_whose_phases_it_shows_when_none_are_given(plan: Callable[..., Plan]) -> None:
    assert plan("model: {name: m}").warnings() == [
        "no `phases` are given, so these three stand for them; write your own list"
    ]


def test_the_peak_is_reached_however_much_of_the_phase_warms_up_or_cools_down(plan: Callable[..., Plan]) -> None:
    wsd = plan(CURRICULUM, "training.lr_scheduler=wsd", "training.warmup_steps=150", "training.decay_ratio=0.25")
    schedule = wsd.phases[0].schedule
    assert schedule is not None
    assert (schedule.warmup_steps, schedule.decay_steps, schedule.rate(150)) == (150, 50, schedule.peak)
    by_epochs = plan(
        CURRICULUM, "training.lr_scheduler=wsd", "training.warmup_steps=50", "training.decay_ratio=0.7",
        ranks=1, prepared={"evolution": Prepared(blocks=180, tokens_trained=1)},
    )  # fmt: skip
    schedule = by_epochs.phase("evolution").schedule
    assert schedule is not None
    assert (schedule.steps, schedule.decay_steps, schedule.rate(50)) == (60, 10, schedule.peak)
