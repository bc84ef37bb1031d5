"""--set puts a value where a line of the file would have put it."""

from collections.abc import Callable

import pytest

from phased_cpt.config import Loaded
from tests.conftest import MINIMAL

Problems = Callable[..., list[str]]
Load = Callable[..., Loaded]

pytestmark = pytest.mark.requirement("C-01")


def test_a_phase_is_called_by_name_or_by_index(loaded: Load) -> None:
    by_name = loaded(MINIMAL, "phases.evolution.training.learning_rate=5e-5").config
    by_index = loaded(MINIMAL, "phases.1.training.learning_rate=5e-5").config
    assert by_name == by_index
    assert by_name.phases[1].training is not None
    assert by_name.phases[1].training.learning_rate == 5e-5
    assert by_name.phases[0].training is None, "the other phase is left alone"


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("training.learning_rate=1e-3", lambda c: c.training.learning_rate, 1e-3),
        ("tracking.wandb.enabled=true", lambda c: c.tracking.wandb.enabled, True),
        ("lora.target_modules=[q_proj, v_proj]", lambda c: c.lora.target_modules, ("q_proj", "v_proj")),
        ("run.dir=a=b", lambda c: c.run.dir, "a=b"),
        ("training.max_grad_norm=null", lambda c: c.training.max_grad_norm, None),
        ("training.max_grad_norm=", lambda c: c.training.max_grad_norm, None),
        ("phases.0.sources.0=c.jsonl", lambda c: c.phases[0].sources[0].path, "c.jsonl"),
        ("phases.0.name=start", lambda c: c.phases[0].name, "start"),
        ("phases=[{name: only, sources: x}]", lambda c: [p.name for p in c.phases], ["only"]),
        ("data={max_tokens: 512, overlap_tokens: 0}", lambda c: c.data.max_tokens, 512),
    ],
)
def test_any_value_can_be_set(loaded: Load, override: str, get: Callable[..., object], value: object) -> None:
    text = MINIMAL.replace("sources: a.jsonl", "sources: [a.jsonl]")
    assert get(loaded(text, override).config) == value
    assert get(loaded(text).config) != value, "it was not so before"


def test_brackets_are_an_index_too(loaded: Load) -> None:
    assert loaded(MINIMAL, "phases[1].epochs=7").config == loaded(MINIMAL, "phases.1.epochs=7").config


def test_a_section_that_is_set_keeps_the_keys_that_are_not_spoken_of(loaded: Load) -> None:
    text = MINIMAL + "    training: {weight_decay: 0.3}\n    data: {where: {a: 1}}\n"
    loaded_config = loaded(text, "training={learning_rate: 1e-3}", "data.where={b: 2}")
    assert (loaded_config.config.training.weight_decay, loaded_config.config.training.learning_rate) == (0.3, 1e-3)
    assert loaded_config.places["training", "weight_decay"] == "run.yaml:5"
    assert loaded_config.config.data.where == {"b": 2}, "a value is replaced"


def test_a_phase_that_is_set_keeps_its_other_keys_and_their_origins(loaded: Load) -> None:
    loaded_config = loaded(
        MINIMAL, "phases[0]={epochs: 2, training: {weight_decay: 0}}", "phases.evolution={epochs: 3}"
    )
    assert [(phase.name, phase.epochs) for phase in loaded_config.config.phases] == [
        ("foundation", 2),
        ("evolution", 3),
    ]
    assert loaded_config.places["phases", 0, "name"] == "run.yaml:3"
    assert loaded_config.places["phases", 0, "training", "weight_decay"] == "--set"


def test_a_value_within_a_section_is_replaced_and_not_merged(loaded: Load) -> None:
    text = MINIMAL + "    data: {where: {lang: py, kind: src}}\n"
    assert loaded(text, "data={where: {x: 1}}").config.data.where == {"x": 1}
    assert loaded(text, "data.where={x: 1}").config.data.where == {"x": 1}
    assert loaded(text, "data.where.x=1").config.data.where == {"lang": "py", "kind": "src", "x": 1}


def test_a_part_of_a_value_makes_all_of_it_the_command_lines(loaded: Load) -> None:
    places = loaded(MINIMAL + "    data: {where: {type: commit}}", "data.where.007=x", "phases.0.data.where.a=b").places
    assert places["data", "where"] == places["phases", 0, "data", "where"] == "--set"
    assert places["data", "where", "type"] == "run.yaml:5"
    config = loaded(MINIMAL, "data.where.007=x", "model.from_config.5.x=1", "model.name=null").config
    assert (config.data.where, config.model.from_config) == ({"007": "x"}, {"5": {"x": 1}})


def test_the_last_override_of_a_key_rules(loaded: Load) -> None:
    assert loaded(MINIMAL, "run.seed=1", "run.seed=2").config.run.seed == 2


def test_the_phases_of_the_defaults_can_be_overridden(loaded: Load) -> None:
    loaded_config = loaded("model: {name: some/model}", "phases.pr_mastery.epochs=5")
    assert [phase.epochs for phase in loaded_config.config.phases] == [3, 2, 5]
    assert loaded_config.places["phases", 2, "epochs"] == "--set"
    assert ("phases", 1, "epochs") not in loaded_config.places


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("lora.r", "--set: given 'lora.r'; allowed: section.key=value, such as training.learning_rate=5e-5"),
        ("evolution.epochs=2", "--set: evolution.epochs: a phase is called phases.evolution; did you mean phases.evolution.epochs?"),
        ("phases.0.description=fix issue #12", "--set: phases.0.description: a # behind a blank begins a comment in YAML; "
                                               "put the text in quotes"),
        ('x{"api_key": "supersecret"}', "--set: given something else; allowed: section.key=value, such as "
                                        "training.learning_rate=5e-5"),
        ("=3", "--set: given '=3'; allowed: section.key=value, such as training.learning_rate=5e-5"),
        ("phases.evolutoin.epochs=1", "--set: phases.evolutoin.epochs: no phase 'evolutoin'; did you mean evolution? "
                                      "(phases: foundation, evolution, or 0 to 1)"),
        ("phases.2.epochs=1", "--set: phases.2.epochs: no phase '2' (phases: foundation, evolution, or 0 to 1)"),
        ("run.sede=1", "--set: run.sede: no such key here; did you mean seed? (keys here: name, output_dir, dir, cache_dir, seed)"),
        ("run.seed.x=1", "--set: run.seed: given {'x': 1}; allowed: a whole number ≥ 0 and < 4,294,967,296"),
        ("model.name.x=1", "--set: model.name.x: model.name is a single value and has no x; set model.name itself"),
        ("lora.r=[1", "--set: lora.r: not valid YAML: while parsing a flow sequence expected ',' or ']', "
                      "but got '<stream end>'"),
        ("lora.r=a: b: c", "--set: lora.r: a colon where none can stand; is the line above indented alike, "
                           "or does a text need quotes?"),
        ("foo.bar.baz=1", "--set: foo: no such key here (keys here: run, model, lora, data, training, evaluation, tracking, "
                          "checkpoint, merge, launch, phases)"),
        ("lora.r=!!python/name:os x", "--set: lora.r: given the tag !!python/name:os; allowed: plain values, "
                                      "nothing is built from a tag"),
        ("lora.target_modules.0=x", "--set: lora.target_modules: given {'0': 'x'}; allowed: auto or a list of texts"),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_used_says_so(problems: Problems, override: str, problem: str) -> None:
    assert problems(MINIMAL, override)[0] == problem
