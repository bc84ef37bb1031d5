"""Every problem of a configuration is told at once, where it stands, with what would be right."""

from collections.abc import Callable
from pathlib import Path

import pytest

from phased_cpt.config import Loaded, Lora, Model, Phase, RunConfig, Source, from_objects, load
from phased_cpt.errors import ConfigError, InputError
from tests.conftest import Write, with_phases

Problems = Callable[..., list[str]]
Load = Callable[..., Loaded]


@pytest.mark.requirement("C-01", "C-04")
def test_all_problems_of_a_file_are_told_at_once_in_its_own_order(problems: Problems) -> None:
    assert problems("""\
        run: {name: my run, seed: true}
        model:
          name: some/model
          presicion: bf16
          precision: bf61
        lora: {r: 0, target_modules: all}
        training:
          lr_scheduler: cosinus
          learning_rate: 1e-4
          learning_rate: 2e-4
        data: {max_tokens: 2048, overlap_tokens: 2048}
        phases:
          - {name: foundation, sources: a.jsonl, epoch: 3}
          - name: Foundation
            sources: [{path: b.jsonl, wieght: 2}, 3]
            epochs: no
    """) == [
        "run.yaml:1: run.name: given 'my run'; allowed: letters, digits, dots, dashes and underscores, at most 64, "
        "the first a letter or a digit",
        "run.yaml:1: run.seed: given true; allowed: a whole number ≥ 0 and < 4,294,967,296",
        "run.yaml:4: model.presicion: no such key here; did you mean precision? (keys here: name, revision, "
        "from_config, tokenizer, eos_token, adapter, precision, attention, use_4bit, bnb_4bit_quant_storage, trust_remote_code)",
        "run.yaml:5: model.precision: given 'bf61'; allowed: one of bf16, fp16, fp32; did you mean bf16?",
        "run.yaml:6: lora.r: given 0; allowed: a whole number ≥ 1",
        "run.yaml:6: lora.target_modules: given 'all'; allowed: auto or a list of texts",
        "run.yaml:8: training.lr_scheduler: given 'cosinus'; allowed: one of cosine, linear, constant, wsd, infinite; "
        "did you mean cosine?",
        "run.yaml:10: training.learning_rate: given twice; first at run.yaml:9",
        "run.yaml:11: data.overlap_tokens: overlap_tokens is 2048 and max_tokens 2048; a window must move on: "
        "overlap_tokens below max_tokens (max_tokens / 16 is usual)",
        "run.yaml:13: phases.foundation.epoch: no such key here; did you mean epochs? (keys here: name, description, "
        "sources, eval_sources, max_steps, tokens, epochs, handover, gate, replay, lora, data, training, evaluation)",
        "run.yaml:14: phases.1.name: given 'Foundation', but an earlier phase is called 'foundation'; "
        "give it another name",
        "run.yaml:15: phases.Foundation.sources.0.wieght: no such key here; did you mean weight? "
        "(keys here: path, split, weight)",
        "run.yaml:15: phases.Foundation.sources.1: given 3; allowed: a mapping with the keys path, split, weight "
        "or a text; put it in quotes to make it a text",
        "run.yaml:16: phases.Foundation.epochs: given 'no'; allowed: a number > 0",
    ]


@pytest.mark.requirement("C-02", "C-04")
def test_json_gets_the_same_messages(problems: Problems) -> None:
    text = '{"model": {"name": "some/model"},\n "phases": [{"name": "one", "sources": "a", "epochs": 0}]}'
    assert problems(text, name="run.json") == ["run.json:2: phases.one.epochs: given 0; allowed: a number > 0"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("run: 3", "run: given 3; allowed: a mapping with the keys name, output_dir, dir, cache_dir, seed"),
        ("run: {seed: 1.5}", "run.seed: given 1.5; allowed: a whole number ≥ 0 and < 4,294,967,296"),
        ("run: {seed: -1}", "run.seed: given -1; allowed: a whole number ≥ 0 and < 4,294,967,296"),
        ("run: {seed: .nan}", "run.seed: given nan; allowed: a whole number ≥ 0 and < 4,294,967,296"),
        ("run: {name: 12}", "run.name: given 12; allowed: letters, digits, dots, dashes and underscores, at most 64, "
                            "the first a letter or a digit; put it in quotes to make it a text"),
        ("run: {name: ../up}", "run.name: given '../up'; allowed: letters, digits, dots, dashes and underscores, "
                               "at most 64, the first a letter or a digit"),
        ("run: {output_dir: ''}", "run.output_dir: given ''; allowed: a text"),
        ("lora: {alpha: .inf}", "lora.alpha: given inf; allowed: a number > 0"),
        ("lora: {alpha: .nan}", "lora.alpha: given nan; allowed: a number > 0"),
        ("lora: {enabled: 1}", "lora.enabled: given 1; allowed: true or false"),
        ("lora: {dropout: true}", "lora.dropout: given true; allowed: a number ≥ 0 and < 1"),
        ("training: {learning_rate: .inf}", "training.learning_rate: given inf; allowed: a number > 0 and ≤ 1"),
        ("training: {learning_rate: 0}", "training.learning_rate: given 0; allowed: a number > 0 and ≤ 1"),
        ("training: {max_grad_norm: off}", "training.max_grad_norm: given 'off'; allowed: a number > 0 or null"),
        ("checkpoint: {every_steps: 0}", "checkpoint.every_steps: given 0; allowed: a whole number ≥ 1"),
        ("merge: {max_shard_size: 2 XB}", "merge.max_shard_size: given '2 XB'; allowed: a size such as 2GB"),
        ("merge: {max_shard_size: true}", "merge.max_shard_size: given true; allowed: a size such as 2GB"),
        ("tracking: {wandb: {enable: true}}", "tracking.wandb.enable: no such key here; did you mean enabled? "
                                              "(keys here: enabled, project, entity, mode)"),
        ("model:", "model: given null; allowed: a mapping with the keys name, revision, from_config, tokenizer, eos_token, adapter, "
                   "precision, attention, use_4bit, bnb_4bit_quant_storage, trust_remote_code"),
    ],
)  # fmt: skip
@pytest.mark.requirement("C-04")
def test_a_wrong_value_is_shown_with_what_is_allowed(problems: Problems, line: str, problem: str) -> None:
    text = with_phases(line) if not line.startswith("model") else f"{line}\nphases: [{{name: one, sources: a}}]"
    assert problems(text) == [f"run.yaml:{text.splitlines().index(line) + 1}: {problem}"]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("learning_rate: 1e-4", "learning_rate: no such key here; did you mean training.learning_rate?"),
        ("run: {output_dir: '${HOME}/runs'}", "run.output_dir: given '${HOME}/runs'; variables are not filled in; "
                                              "write it out, or use --set from a shell"),
        ("lora: {target_modules: [a]}\nmerge: {max_shard_size: 99999999999999TB}",
         "merge.max_shard_size: given '99999999999999TB'; allowed: a size such as 2GB"),
        ("run: {dir: $RUNS/a}", "run.dir: given '$RUNS/a'; variables are not filled in; "
                                "write it out, or use --set from a shell"),
        ("run: {dir: *x.jsonl}", "a * begins an alias in YAML; put the text in quotes"),
        ("run: {dir: @data}", "a text cannot begin with this character; put it in quotes"),
        ("run: {dir: 'x}", "a quote that is opened near here is not closed"),
        ("run: {dir: 'a\\0b'}\nlora: {r: !!int 3}", "lora.r: given the tag !!int; allowed: plain values, nothing is built from a tag"),
    ],
)  # fmt: skip
def test_a_mistake_that_many_make_gets_a_hint(write: Write, line: str, hint: str) -> None:
    with pytest.raises(InputError) as refused:
        load(write(with_phases(line)))
    assert [hint in told for told in str(refused.value).splitlines()] == [True]


def test_a_key_of_a_section_that_stands_in_the_phase_is_sent_there(problems: Problems) -> None:
    (told,) = problems("model: {name: m}\nphases: [{name: a, sources: x, max_tokens: 512}]")
    assert "phases.a.max_tokens: no such key here; did you mean phases.a.data.max_tokens?" in told


def test_the_home_folder_is_found(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = loaded("run: {output_dir: ~/runs}\nmodel: {name: m}\nphases: [{name: a, sources: ~/data/*.jsonl}]").config
    assert (config.run.output_dir, config.phases[0].sources[0].path) == ("/home/ada/runs", "/home/ada/data/*.jsonl")


@pytest.mark.parametrize(
    ("phase", "problem"),
    [
        ("{sources: a}", "phases.0.name: nothing given; needed: letters, digits, dashes and underscores, at most 64, "
                         "the first a letter or a digit, not all digits"),
        ("{name: one}", "phases.one.sources: nothing given; needed: a list of mappings with the keys path, split, weight "
                        "or texts"),
        ("{name: one, sources: []}", "phases.one.sources: given []; allowed: a list of mappings with the keys path, split, "
                                     "weight or texts"),
        ("{name: a.b, sources: a}", "phases.0.name: given 'a.b'; allowed: letters, digits, dashes and underscores, "
                                    "at most 64, the first a letter or a digit, not all digits"),
        ("{name: '12', sources: a}", "phases.0.name: given '12'; allowed: letters, digits, dashes and underscores, "
                                     "at most 64, the first a letter or a digit, not all digits"),
        ("{name: one, sources: a, replay: {two: 2}}", "phases.one.replay.two: given 2; allowed: a number > 0 and < 1"),
        ("{name: one, sources: [{weight: 2}]}", "phases.one.sources.0.path: nothing given; needed: a text"),
    ],
)  # fmt: skip
def test_a_wrong_phase_is_called_by_its_name(problems: Problems, phase: str, problem: str) -> None:
    text = f"model: {{name: some/model}}\nphases:\n  - {phase}\n"
    assert [found for found in problems(text) if "is the first phase" not in found] == [f"run.yaml:3: {problem}"]


def test_a_curriculum_without_phases_is_refused(problems: Problems) -> None:
    assert problems("model: {name: some/model}\nphases: []")[0].startswith(
        "run.yaml:2: phases: given []; allowed: a list"
    )
    assert problems("model: {name: some/model}\nphases:\n  one: {sources: a}")[0].startswith(
        "run.yaml:2: phases: given {"
    )


@pytest.mark.requirement("C-02", "C-08")
def test_a_partial_file_is_laid_over_the_defaults(loaded: Load) -> None:
    config = loaded("model: {name: some/model}\ntracking: {wandb: {project: mine}}\ntraining: {weight_decay: 0}").config
    assert config.tracking.wandb.project == "mine"
    assert config.tracking.tensorboard.enabled
    assert (config.training.weight_decay, config.training.learning_rate) == (0, 1e-4)
    assert [phase.name for phase in config.phases] == ["foundation", "evolution", "pr_mastery"]


def test_numbers_are_read_as_people_write_them(loaded: Load) -> None:
    config = loaded("""\
        model: {name: some/model, use_4bit: yes}
        training: {learning_rate: 1e-4, global_batch_size: 1_024, min_lr_ratio: "0.1"}
        merge: {max_shard_size: 1.5GiB}
        data: {max_line_bytes: 10 MB}
        phases: [{name: one, sources: a.jsonl, tokens: 2e9}]
    """).config
    assert (config.training.learning_rate, config.training.global_batch_size) == (1e-4, 1024)
    assert (config.merge.max_shard_size, config.data.max_line_bytes) == (1_610_612_736, 10_000_000)
    assert (config.phases[0].tokens, config.model.use_4bit, config.training.min_lr_ratio) == (2 * 10**9, True, 0.1)


def test_one_source_stands_for_a_list_of_one(loaded: Load) -> None:
    short = loaded("model: {name: m}\nphases: [{name: one, sources: a.jsonl}]").config
    long = loaded("model: {name: m}\nphases: [{name: one, sources: [{path: a.jsonl, weight: 1}]}]").config
    assert short.phases[0].sources == long.phases[0].sources == (Source(path="a.jsonl"),)


def test_a_configuration_cannot_be_changed_afterwards(loaded: Load) -> None:
    config = loaded(with_phases("")).config
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1  # type: ignore[misc]


@pytest.mark.requirement("C-03")
class TestFromPython:
    """A configuration can be built from objects, and is held to the same rules."""

    def test_every_section_can_be_built_with_its_defaults(self) -> None:
        config = RunConfig(model=Model(name="some/model"))
        assert (config.lora.r, config.data.max_tokens, config.training.gradient_accumulation_steps) == (128, 32768, 6)
        assert from_objects(config).config == config

    def test_what_was_given_has_its_place(self) -> None:
        phase = Phase(name="one", sources=(Source(path="a.jsonl"),), lora=Lora(r=4))
        loaded = from_objects(RunConfig(model=Model(name="some/model"), phases=(phase,)))
        assert loaded.places["phases", 0, "lora", "r"] == "Python"
        assert ("phases", 0, "lora", "alpha") not in loaded.places

    def test_the_rules_hold_there_too(self) -> None:
        with pytest.raises(ConfigError, match=r"model\.name: nothing given"):
            from_objects(RunConfig())


def test_problems_of_the_file_and_of_the_command_line_come_together(problems: Problems) -> None:
    assert problems(with_phases("run: {sed: 1}"), "lora.r=0") == [
        "--set: lora.r: given 0; allowed: a whole number ≥ 1",
        "run.yaml:3: run.sed: no such key here; did you mean seed? (keys here: name, output_dir, dir, cache_dir, seed)",
    ]


def test_a_rule_is_silent_about_a_value_that_is_refused_anyway(problems: Problems) -> None:
    found = problems(with_phases("data: {max_tokens: many, overlap_tokens: 2048}"))
    assert [problem.split(":")[2].strip() for problem in found] == ["data.max_tokens"]


def test_many_wrong_items_of_a_list_are_each_told(problems: Problems) -> None:
    found = problems(with_phases("lora: {target_modules: [a, b, c, d, e, f, g, h, i, 1, 2, k, 3]}"))
    assert [problem.split(":")[2].strip() for problem in found] == [
        "lora.target_modules.9", "lora.target_modules.10", "lora.target_modules.12",
    ]  # fmt: skip


def test_the_path_of_the_file_is_shown_as_it_was_given(write: Write, tmp_path: Path) -> None:
    path = write("model: 3", "deep/er/run.yaml").resolve()
    with pytest.raises(ConfigError, match=f"^{path}:1: model: given 3"):
        load(path)
