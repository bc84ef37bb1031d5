"""One broken configuration for each rule across fields, with the message it gets, and the same one mended."""

import contextlib
from collections.abc import Callable

import pytest

from phased_cpt.config import Loaded, load
from phased_cpt.config.allowed import keys_at
from phased_cpt.config.rules import RULES
from phased_cpt.config.shipped import shipped_names
from phased_cpt.errors import ConfigError
from tests.conftest import Write

Problems = Callable[..., list[str]]
Load = Callable[..., Loaded]

# rule: (what breaks it, its message, what mends it)
CASES: dict[str, tuple[str, str, str]] = {
    "a_base_is_named": (
        "phases: [{name: one, sources: a}]",
        "run.yaml:1: model.name: nothing given; needed: a hub id or a folder (or model.from_config, for a random start)",
        "model: {from_config: {model_type: llama}}\nphases: [{name: one, sources: a}]",
    ),
    "one_base_only": (
        "model: {name: m, from_config: c.json}\nphases: [{name: one, sources: a}]",
        "run.yaml:1: model.from_config: given beside model.name; a model is loaded by name or begun from a config, "
        "so take one of them out",
        "model: {from_config: c.json}\nphases: [{name: one, sources: a}]",
    ),
    "remote_code_is_pinned": (
        "model: {name: org/m, trust_remote_code: true, revision: main}\nphases: [{name: one, sources: a}]",
        "run.yaml:1: model.trust_remote_code: given true without a pinned model.revision; "
        "set it to the whole commit (40 digits) that you have read (a folder is written ./like/this)",
        f"model: {{name: org/m, trust_remote_code: true, revision: '{'0a' * 20}'}}\nphases: [{{name: one, sources: a}}]",
    ),
    "phase_names_differ": (
        "model: {name: m}\nphases:\n  - {name: one, sources: a}\n  - {name: One, sources: a}",
        "run.yaml:4: phases.1.name: given 'One', but an earlier phase is called 'one'; give it another name",
        "model: {name: m}\nphases:\n  - {name: one, sources: a}\n  - {name: two, sources: a}",
    ),
    "overlap_fits_the_window": (
        "model: {name: m}\ndata: {max_tokens: 1024, overlap_tokens: 1024}\nphases: [{name: one, sources: a}]",
        "run.yaml:2: data.overlap_tokens: overlap_tokens is 1024 and max_tokens 1024; a window must move on: "
        "overlap_tokens below max_tokens (max_tokens / 16 is usual)",
        "model: {name: m}\ndata: {max_tokens: 1024, overlap_tokens: 64}\nphases: [{name: one, sources: a}]",
    ),
    "warmup_fits_the_phase": (
        "model: {name: m}\nphases:\n  - {name: one, sources: a, max_steps: 10, training: {warmup_steps: 10}}",
        "run.yaml:3: phases.one.training.warmup_steps: warmup_steps is 10 and max_steps 10; "
        "the warm-up must end before the phase does",
        "model: {name: m}\nphases:\n  - {name: one, sources: a, max_steps: 10, training: {warmup_steps: 9}}",
    ),
    "warmup_and_decay_fit": (
        "model: {name: m}\ntraining: {lr_scheduler: wsd, warmup_ratio: 0.5, decay_ratio: 0.6}\n"
        "phases: [{name: one, sources: a}]",
        "run.yaml:2: training.decay_ratio: warmup_ratio and decay_ratio 0.6 together take more than the whole phase; "
        "lower one",
        "model: {name: m}\ntraining: {lr_scheduler: wsd, warmup_ratio: 0.4, decay_ratio: 0.6}\n"
        "phases: [{name: one, sources: a}]",
    ),
    "infinite_never_rises_again": (
        "model: {name: m}\ntraining: {lr_scheduler: infinite, constant_ratio: 0.1, min_lr_ratio: 0.2}\n"
        "phases: [{name: one, sources: a}]",
        "run.yaml:2: training.constant_ratio: constant_ratio is 0.1 and min_lr_ratio 0.2; the end must not lie above it",
        "model: {name: m}\ntraining: {constant_ratio: 0.1, min_lr_ratio: 0.2}\nphases: [{name: one, sources: a}]",
    ),
    "infinite_goes_on_at_its_rate": (
        "model: {name: m}\ntraining: {lr_scheduler: infinite}\nphases:\n  - {name: one, sources: a}\n"
        "  - {name: two, sources: a, training: {learning_rate: 5e-5}}",
        "run.yaml:5: phases.two.training.learning_rate: infinite goes on at 2.5e-05 (learning_rate × constant_ratio) "
        "after 5e-05 in one; make them equal, or take another lr_scheduler",
        "model: {name: m}\ntraining: {lr_scheduler: infinite}\nphases:\n  - {name: one, sources: a}\n"
        "  - {name: two, sources: a, training: {learning_rate: 5e-5, constant_ratio: 1}}",
    ),
    "rslora_has_an_alpha_of_its_own": (
        "model: {name: m}\nlora: {use_rslora: true}\nphases: [{name: one, sources: a}]",
        "run.yaml:2: lora.use_rslora: use_rslora scales by alpha / sqrt(r), which is 22.6 here (alpha / r: 2) and above 8; "
        "lora.alpha: 22.6 makes it the usual 2",
        "model: {name: m}\nlora: {use_rslora: true, alpha: 22.6}\nphases: [{name: one, sources: a}]",
    ),
    "orthogonal_weights_can_be_drawn": (
        "model: {name: m}\nlora: {init: orthogonal, r: 9}\nphases: [{name: one, sources: a}]",
        "run.yaml:2: lora.init: orthogonal needs an even rank, and lora.r is 9; default and gaussian do not",
        "model: {name: m}\nlora: {init: orthogonal, r: 8}\nphases: [{name: one, sources: a}]",
    ),
    "dora_stands_alone": (
        "model: {name: m}\nlora: {use_dora: true}\nphases:\n  - {name: one, sources: a, handover: stack}\n"
        "  - {name: two, sources: a}",
        "run.yaml:2: lora.use_dora: DoRA cannot be one of several adapters; end one with `handover: merge`, not stack",
        "model: {name: m}\nlora: {use_dora: true}\nphases:\n  - {name: one, sources: a, handover: merge}\n"
        "  - {name: two, sources: a}",
    ),
    "an_adapter_needs_its_base": (
        "model: {from_config: c.json, adapter: old}\nphases: [{name: one, sources: a}]",
        "run.yaml:1: model.from_config: given beside model.adapter; an adapter fits the base it was trained on, "
        "not random weights",
        "model: {name: m, adapter: old}\nphases: [{name: one, sources: a}]",
    ),
    "rows_fit_the_positions": (
        "model: {from_config: {max_position_embeddings: 1024}}\ndata: {max_tokens: 4096}\nphases: [{name: one, sources: a}]",
        "run.yaml:2: data.max_tokens: max_tokens is 4096, and from_config has max_position_embeddings 1024; "
        "max_tokens at most 1024, or another rope_type in from_config.rope_parameters",
        "model: {from_config: {max_position_embeddings: 4096}}\ndata: {max_tokens: 4096}\nphases: [{name: one, sources: a}]",
    ),
    "four_bits_store_as_zero3_needs": (
        "model: {name: m, use_4bit: true, bnb_4bit_quant_storage: uint8}\ntraining: {deepspeed: zero3}\n"
        "phases: [{name: one, sources: a}]",
        "run.yaml:2: training.deepspeed: ZeRO-3 shards 4-bit weights only as bnb_4bit_quant_storage = precision, "
        "not uint8 beside bf16; leave bnb_4bit_quant_storage at auto, or use deepspeed: zero2",
        "model: {name: m, use_4bit: true}\ntraining: {deepspeed: zero3}\nphases: [{name: one, sources: a}]",
    ),
    "four_bits_are_frozen": (
        "model: {name: m, use_4bit: true}\nlora: {enabled: false}\nphases: [{name: one, sources: a}]",
        "run.yaml:2: lora.enabled: lora.enabled is false and use_4bit true, but 4-bit weights stay frozen; "
        "change one of the two",
        "model: {name: m}\nlora: {enabled: false}\nphases: [{name: one, sources: a}]",
    ),
    "deepspeed_file_is_known": (
        "model: {name: m}\ntraining: {deepspeed: zero4}\nphases: [{name: one, sources: a}]",
        "run.yaml:2: training.deepspeed: given 'zero4'; allowed: auto, "
        f"{', '.join(shipped_names('deepspeed_configs'))}, or the path of a .json file; did you mean zero3?",
        "model: {name: m}\ntraining: {deepspeed: my/zero4.json}\nphases: [{name: one, sources: a}]",
    ),
    "batch_divides": (
        "model: {name: m}\nlaunch: {num_gpus: 4}\ntraining: {micro_batch_size: 2, global_batch_size: 20}\n"
        "phases: [{name: one, sources: a}]",
        "run.yaml:3: training.global_batch_size: global_batch_size 20 is no multiple of micro_batch_size 2 × num_gpus 4; "
        "near it: 16 and 24",
        "model: {name: m}\nlaunch: {num_gpus: 5}\ntraining: {micro_batch_size: 2, global_batch_size: 20}\n"
        "phases: [{name: one, sources: a}]",
    ),
    "continued_adapters_keep_their_shape": (
        "model: {name: m}\nphases:\n  - {name: one, sources: a}\n  - {name: two, sources: a, lora: {r: 8, dropout: 0.2}}",
        "run.yaml:4: phases.two.lora: lora.r is 8, but this phase goes on with one's adapter, which has 128; "
        "take it out, or end one with `handover: merge` or `stack`",
        "model: {name: m}\nphases:\n  - {name: one, sources: a, handover: merge}\n  - {name: two, sources: a, lora: {r: 8}}",
    ),
    "an_optimizer_is_carried_to_the_same_weights": (
        "model: {name: m}\nphases:\n  - {name: one, sources: a}\n"
        "  - {name: two, sources: a, training: {optimizer_at_start: carry}}",
        "run.yaml:4: phases.two.training.optimizer_at_start: optimizer_at_start is carry, and one may publish weights from "
        "before its end; set evaluation.publish: last there",
        "model: {name: m}\nevaluation: {publish: last}\nphases:\n  - {name: one, sources: a}\n"
        "  - {name: two, sources: a, training: {optimizer_at_start: carry}}",
    ),
    "general_sets_have_names_of_their_own": (
        "model: {name: m}\nevaluation: {general: {one: wiki.jsonl}}\nphases: [{name: one, sources: a}]",
        "run.yaml:2: evaluation.general: one is a phase, whose held-out documents are measured anyway; "
        "give the set another name",
        "model: {name: m}\nevaluation: {general: {wiki: wiki.jsonl}}\nphases: [{name: one, sources: a}]",
    ),
    "best_is_chosen_by_what_is_measured": (
        "model: {name: m}\nevaluation: {best_of: {two: 1}}\nphases: [{name: one, sources: a}, {name: two, sources: a}]",
        "run.yaml:2: evaluation.best_of: best_of names 'two', which is neither this phase nor an earlier one, nor a "
        "general set; allowed: one",
        "model: {name: m}\nevaluation: {best_of: {one: 1}}\nphases: [{name: one, sources: a}, {name: two, sources: a}]",
    ),
    "gates_judge_what_is_measured": (
        "model: {name: m}\nphases:\n  - {name: one, sources: a}\n  - {name: two, sources: a, gate: {on_fail: warn}}",
        "run.yaml:4: phases.two.gate: gate judges nothing; give max_forgetting, min_gain, or both",
        "model: {name: m}\nphases:\n  - {name: one, sources: a}\n  - {name: two, sources: a, gate: {max_forgetting: 0}}",
    ),
    "full_training_starts_from_a_base": (
        "model: {name: m}\nphases:\n  - {name: one, sources: a}\n  - {name: two, sources: a, lora: {enabled: false}}",
        "run.yaml:4: phases.two.lora.enabled: lora.enabled is false, but two is to go on with an adapter; "
        "to begin from a base, end one with `handover: merge`",
        "model: {name: m}\nphases:\n  - {name: one, sources: a, lora: {enabled: false}}\n  - {name: two, sources: a}",
    ),
    "assistant_loss_needs_messages": (
        "model: {name: m}\ndata: {assistant_only_loss: true, text_field: text}\nphases: [{name: one, sources: a}]",
        "run.yaml:2: data.assistant_only_loss: assistant_only_loss needs chat data, and text_field text is raw text; "
        "set text_field: messages, or take it out",
        "model: {name: m}\ndata: {assistant_only_loss: true, text_field: messages}\nphases: [{name: one, sources: a}]",
    ),
    "replay_draws_from_earlier_phases": (
        "model: {name: m}\nphases:\n  - {name: one, sources: a}\n  - {name: two, sources: a, replay: {tow: 0.1}}",
        "run.yaml:4: phases.two.replay: no phase before two is called 'tow'; allowed: one",
        "model: {name: m}\nphases:\n  - {name: one, sources: a}\n  - {name: two, sources: a, replay: {one: 0.1}}",
    ),
    "patience_needs_held_out_documents": (
        "model: {name: m}\ndata: {eval_share: 0}\nevaluation: {patience: 3}\nphases: [{name: one, sources: a}]",
        "run.yaml:3: evaluation.patience: patience needs held-out documents, and eval_share is 0; "
        "raise it, or give eval_sources",
        "model: {name: m}\ndata: {eval_share: 0}\nevaluation: {patience: 3}\n"
        "phases: [{name: one, sources: a, eval_sources: b}]",
    ),
    "merged_model_has_a_place_of_its_own": (
        "model: {name: m}\nmerge: {output_dir: ./phase1_one/merged}\nphases: [{name: one, sources: a}]",
        "run.yaml:2: merge.output_dir: given './phase1_one/merged', which the run needs for itself; "
        "allowed: another name in the run folder, or an absolute path",
        "model: {name: m}\nmerge: {output_dir: out/phase1_one}\nphases: [{name: one, sources: a}]",
    ),
}


@pytest.mark.requirement("C-04")
@pytest.mark.parametrize("rule", CASES)
def test_a_broken_rule_says_what_and_where_and_what_mends_it(problems: Problems, loaded: Load, rule: str) -> None:
    broken, message, mended = CASES[rule]
    assert problems(broken) == [message]
    assert loaded(mended).config


def test_every_rule_has_a_case() -> None:
    assert sorted(rule.check.__name__ for rule in RULES) == sorted(CASES)


def test_every_key_that_a_rule_compares_exists() -> None:
    compared = {name for rule in RULES for name in rule.compares}
    assert len(compared) > 15
    for name in compared:
        section, _, key = name.partition(".")
        assert key in keys_at(("phases", 0) if section == "phase" else (section,)), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {name: m}\nphases: [{name: one, sources: a, replay: 0.1}]",
            "phases.one.replay: one is the first phase: there is nothing to replay; take it out",
        ),
        (
            "model: {name: m}\nphases: [{name: a, sources: a}, {name: b, sources: a}, "
            "{name: c, sources: a, replay: {a: 0.5, b: 0.5}}]",
            "phases.c.replay: the shares of replay leave nothing for the phase itself; their sum must be below 1",
        ),
        (
            "model: {name: m}\ndata: {assistant_only_loss: true}\nphases: [{name: one, sources: book.txt.gz}]",
            "data.assistant_only_loss: assistant_only_loss needs chat data, and book.txt.gz is raw text; "
            "set text_field: messages, or take it out",
        ),
        (
            "model: {name: m}\ntraining: {lr_scheduler: infinite, cooldown_ratio: 0.7, decay_ratio: 0.4}\n"
            "phases: [{name: one, sources: a}]",
            "training.decay_ratio: warmup_ratio, cooldown_ratio and decay_ratio 0.4 together take more than the whole "
            "phase; lower one",
        ),
        (
            "model: {name: m}\nphases: [{name: one, sources: a}, {name: two, sources: a, lora: {use_dora: true}}]",
            "phases.two.lora: lora.use_dora is True, but this phase goes on with one's adapter, which has False; "
            "take it out, or end one with `handover: merge` or `stack`",
        ),
        (
            "model: {name: m, use_4bit: true}\nlora: {init: orthogonal}\nphases: [{name: one, sources: a}]",
            "lora.init: orthogonal needs 16-bit weights (model.use_4bit); default and gaussian do not",
        ),
        (
            "model: {name: m}\nlora: {init: pissa_niter_4}\nphases: [{name: one, sources: a}]",
            "lora.init: given 'pissa_niter_4'; it moves a part of the base into the adapter, and the base stays as it is "
            "in every phase; take default, gaussian or orthogonal",
        ),
        (
            "model: {name: m}\nlora: {init: gausian}\nphases: [{name: one, sources: a}]",
            "lora.init: given 'gausian'; allowed: one of default, gaussian, orthogonal; did you mean gaussian?",
        ),
        (
            "model: {name: m}\nphases: [{name: one, sources: a, gate: {max_forgetting: 0.1}}]",
            "phases.one.gate: gate.max_forgetting: nothing comes before the first phase; give it to a later one",
        ),
        (
            "model: {name: m}\nevaluation: {matrix: end}\nphases: [{name: one, sources: a}, "
            "{name: two, sources: a, gate: {max_forgetting: 0.1}}]",
            "phases.two.gate: gate.max_forgetting needs evaluation.matrix: every_phase, up to this phase",
        ),
        (
            "model: {name: m}\ndata: {eval_share: 0}\nphases: [{name: one, sources: a}, "
            "{name: two, sources: a, gate: {max_forgetting: 0.1}}]",
            "phases.two.gate: gate.max_forgetting: no phase before it holds anything out; raise data.eval_share there",
        ),
        (
            "model: {name: m}\ndata: {eval_share: 0}\nphases: [{name: one, sources: a, gate: {min_gain: 0.1}}]",
            "phases.one.gate: gate.min_gain needs held-out documents, and eval_share is 0; raise it, or give eval_sources",
        ),
        (
            "model: {name: m}\nphases: [{name: one, sources: a, gate: {min_gain: 0, on_fail: retry_with_replay}}]",
            "phases.one.gate: gate.on_fail: retry_with_replay: nothing comes before one; take stop or warn",
        ),
        (
            "model: {name: m}\nphases: [{name: one, sources: a}, {name: two, sources: a, "
            "evaluation: {general: {wiki: w}}}]",
            "phases.two.evaluation.general: general sets are measured after every phase; name them in the run's own "
            "evaluation",
        ),
        (
            "model: {name: m}\nevaluation: {publish: last}\nphases: [{name: one, sources: a, handover: merge}, "
            "{name: two, sources: a, training: {optimizer_at_start: carry}}]",
            "phases.two.training.optimizer_at_start: optimizer_at_start is carry, but two does not go on with the "
            "weights that one trains; take it out, or end one with `handover: continue`",
        ),
        (
            "model: {name: m}\nevaluation: {publish: last}\nphases: [{name: one, sources: a}, "
            "{name: two, sources: a, training: {optimizer: adafactor, optimizer_at_start: carry}}]",
            "phases.two.training.optimizer_at_start: optimizer_at_start is carry, from adamw_torch_fused to adafactor; "
            "give both phases the same optimizer",
        ),
        (
            "model: {name: m}\nphases: [{name: one, sources: a, training: {optimizer_at_start: carry}}]",
            "phases.one.training.optimizer_at_start: optimizer_at_start is carry, and nothing comes before one; take it out",
        ),
        (
            "model: {name: m, adapter: old}\nphases: [{name: one, sources: a, lora: {enabled: false}}]",
            "phases.one.lora.enabled: lora.enabled is false, but one is to go on with an adapter; "
            "to begin from a base, take model.adapter out",
        ),
    ],
)
def test_the_other_ways_to_break_a_rule(problems: Problems, text: str, message: str) -> None:
    assert [problem.split(": ", 1)[1] for problem in problems(text)] == [message]


def test_a_value_that_several_phases_inherit_is_refused_once_where_it_stands(problems: Problems) -> None:
    found = problems(
        "model: {name: m}\ntraining:\n  deepspeed: zero4\nphases: [{name: a, sources: a}, {name: b, sources: a}]"
    )
    assert [problem.split(":")[:3] for problem in found] == [["run.yaml", "3", " training.deepspeed"]]


@pytest.mark.parametrize(
    "output_dir", ["run.json", "./logs/x", "out/../../x", "phase2_evolution", ".", "..", "archive/1", "final_model"]
)
def test_the_merged_model_does_not_lie_on_what_the_run_writes(problems: Problems, output_dir: str) -> None:
    (told,) = problems(f"model: {{name: m}}\nmerge: {{output_dir: {output_dir}}}\nphases: [{{name: one, sources: a}}]")
    assert "which the run needs for itself" in told


@pytest.mark.parametrize(
    ("rope", "fits"),
    [
        ("rope_parameters: {rope_type: yarn, factor: 4}", True),
        ("rope_scaling: {rope_type: linear, factor: 4}", True),
        ("rope_scaling: {rope_type: default}", False),
        ("rope_parameters: {rope_theta: 10000}", False),
    ],
)
def test_stretched_positions_hold_longer_rows(write: Write, rope: str, fits: bool) -> None:
    model = f"model: {{from_config: {{max_position_embeddings: 1024, {rope}}}}}"
    path = write(f"{model}\ndata: {{max_tokens: 4096}}\nphases: [{{name: one, sources: a}}]")
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="max_position_embeddings 1024"):
        load(path)


@pytest.mark.parametrize("deepspeed", ["auto", "my/stage3.json", "zero3_offload"])
def test_whatever_may_shard_four_bits_needs_them_stored_alike(problems: Problems, deepspeed: str) -> None:
    model = "model: {name: m, use_4bit: true, bnb_4bit_quant_storage: uint8}"
    (told,) = problems(f"{model}\ntraining: {{deepspeed: {deepspeed}}}\nphases: [{{name: one, sources: a}}]")
    assert "ZeRO-3 shards 4-bit weights only as" in told


@pytest.mark.parametrize(
    "phases",
    [
        "{name: a, sources: a}, {name: b, sources: a, lora: {dropout: 0}}",
        "{name: a, sources: a, lora: {r: 8}}, {name: b, sources: a}",
        "{name: a, sources: a, lora: {target_modules: [q, v]}}, {name: b, sources: a, lora: {target_modules: [v, q]}}",
        "{name: a, sources: a, data: {max_tokens: 64, overlap_tokens: 64, chunk_long_samples: false}}",
        "{name: a, sources: a, data: {max_tokens: 64}}",
        "{name: a, sources: a, max_steps: 9, training: {lr_scheduler: infinite, cooldown_ratio: 0.9, warmup_steps: 0}}, "
        "{name: b, sources: a, max_steps: 9, training: {lr_scheduler: infinite, warmup_steps: 9}}",
        "{name: a, sources: a.json, data: {assistant_only_loss: true, text_field: conversations}}",
    ],
    ids=[
        "dropout is free",
        "settings go on with the adapter",
        "order says nothing",
        "nothing is cut",
        "the overlap follows",
        "infinite that goes on neither warms up nor falls again",
        "a field of chats",
    ],
)
def test_what_is_right_is_not_refused(loaded: Load, phases: str) -> None:
    assert loaded(f"model: {{name: m}}\nphases: [{phases}]")


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        # What is refused elsewhere does not hide a broken rule …
        ("name: m", ["model.name", "name"]),
        ("steps: 5\nmodel: {name: m}\nphases: [{name: a, sources: a, max_steps: 5, training: {warmup_steps: 9}}]",
         ["steps", "phases.a.training.warmup_steps"]),
        ("model: {name: m}\nevaluation: {micro_batch_size: 0}\ntraining: {micro_batch_size: 3, global_batch_size: 16}",
         ["evaluation.micro_batch_size", "training.global_batch_size"]),
        ("model: {name: m}\nphases:\n- {name: a, sources: a, training: {warmup_steps: -1}}\n"
         "- {name: b, sources: a, max_steps: 5, training: {warmup_steps: 9}}",
         ["phases.a.training.warmup_steps", "phases.b.training.warmup_steps"]),
        ("phases: [{name: a, sources: [5]}]", ["model.name", "phases.a.sources.0"]),
        # … and a rule is silent about what is refused, in whole or in part.
        ("model: {name: !x y}\nphases: [{name: a, sources: a}]", ["model.name"]),
        ("model: {name: m}\ndata: {max_tokens: 64, max_tokens: 4096}", ["data.max_tokens"]),
        ("model: {name: m}\nlora: {r: 8}\nphases:\n- {name: a, sources: a, lora: {r: 16}}\n- {name: b, sources: a, lora: 16}",
         ["phases.b.lora"]),
        ("model: {name: m}\ntraining: {warmup_steps: 20}\nphases: [{name: a, sources: a, max_steps: 10, training: 5}]",
         ["phases.a.training"]),
        ("model: {name: m}\nphases: [3, {name: a, sources: a, replay: {b: 0.1}}]", ["phases.0"]),
    ],
)  # fmt: skip
def test_rules_and_refused_values_do_not_get_in_each_others_way(
    problems: Problems, text: str, paths: list[str]
) -> None:
    assert [problem.split(": ")[1] for problem in problems(text)] == paths


def test_a_rule_points_at_what_was_written_in_the_phase_before_the_run(problems: Problems) -> None:
    head = "model: {name: m}\ndata:\n  packing: pad\n  overlap_tokens: 600\n  max_tokens: 4096\n"
    in_phase = "phases:\n- name: a\n  sources: a\n  data: {max_tokens: 512}\n"
    (told,) = problems(head + in_phase)
    assert told.startswith("run.yaml:9: phases.a.data.max_tokens: overlap_tokens is 600 and max_tokens 512")
    (told,) = problems(head.replace("4096", "512") + "phases: [{name: a, sources: a}]")
    assert told.startswith("run.yaml:4: data.overlap_tokens: overlap_tokens is 600 and max_tokens 512")
