"""Keys and tokens in a file are refused, with the variable to use instead, and are never repeated."""

from collections.abc import Callable
from pathlib import Path

import pytest

from phased_cpt.config import Loaded, Model, RunConfig, from_objects, load
from phased_cpt.errors import ConfigError
from phased_cpt.ledger import Ledger
from phased_cpt.plan import make_plan
from phased_cpt.run_dir import RunDir
from tests.conftest import Call, Write, with_phases

Problems = Callable[..., list[str]]

pytestmark = pytest.mark.requirement("C-07")

CANARY = "hf_" + "Kj3x9QpLm2Vb7Tz8Wd4R"


@pytest.mark.parametrize(
    ("line", "path", "variable"),
    [
        ("tracking: {wandb: {api_key: abc123}}", "tracking.wandb.api_key", "`export WANDB_API_KEY=…`"),
        ("wandb_api_key: abc123", "wandb_api_key", "`export WANDB_API_KEY=…`"),
        ("model: {name: m, hf_token: abc123}", "model.hf_token", "`export HF_TOKEN=…`"),
        (f"model: {{name: m, revision: {CANARY}}}", "model.revision", "`export HF_TOKEN=…`"),
        (f"data: {{where: {{a: [b, {CANARY}]}}}}", "data.where.a.1", "`export HF_TOKEN=…`"),
        ("model: {name: 'https://me:secret@host/m'}", "model.name", "an environment variable"),
        ("password: 123", "password", "an environment variable"),
        ("run: {name: a, hfToken: abc}", "run.hfToken", "`export HF_TOKEN=…`"),
        ("data: {where: {api-key: abc}}", "data.where.api-key", "an environment variable"),
        (f"tracking: {{wandb: {'0a' * 20}}}", "tracking.wandb", "`export WANDB_API_KEY=…`"),
        ("run: {output_dir: 's3://:secret@host/x'}", "run.output_dir", "an environment variable"),
        (f"lora: {{target_modules: [a, {CANARY}, b]}}", "lora.target_modules.1", "`export HF_TOKEN=…`"),
    ],
)
def test_a_secret_is_refused_with_the_variable_to_use(problems: Problems, line: str, path: str, variable: str) -> None:
    text = with_phases(line) if not line.startswith("model") else f"{line}\nphases: [{{name: one, sources: a}}]"
    found = [problem for problem in problems(text) if "secret" in problem]
    place = f"run.yaml:{text.splitlines().index(line) + 1}: {path}: given a secret (not shown); take it out of the file and use "
    assert len(found) == 1
    assert found[0].startswith(place)
    assert variable in found[0]


@pytest.mark.parametrize("verb", [["plan"], ["config", "show"], ["run", "--dry-run"], ["plan", "--json"]])
@pytest.mark.parametrize(
    ("text", "override"),
    [
        (f"model: {{name: m, token: {CANARY}}}", None),
        (f"model: {{name: m, {CANARY}: 1}}", None),
        (f"model: {{name: m, precision: {CANARY}}}", None),
        ("model: {name: m}", f"model.revision={CANARY}"),
        ("model: {name: m}", f"tracking.wandb.api_key={CANARY}"),
        (f"model: {{name: m, token: {CANARY}}}", "model.token.x=1"),
        (f"model: {{name: m, token: {CANARY}, token: {CANARY}}}", None),
        (f"data: {{max_tokens: [{CANARY}, x, {CANARY}, y]}}", None),
        (f"phases: [{CANARY}, {CANARY}, 5]", None),
        (f"phases: [{{name: {CANARY}, sources: x}}]", "phases.zz.epochs=1"),
        ("model: {name: m}", CANARY),
        ("model: {name: m}", f"model.name.{CANARY}=1"),
        ("model: {name: m}", f"phases.{CANARY}.epochs=1"),
        (f"model: {{name: *{CANARY}}}", None),
        (f"model: {{name: !{CANARY} x}}", None),
        (f"{CANARY}: {{[a]: b}}", None),
    ],
)
def test_a_secret_is_never_repeated(write: Write, call: Call, verb: list[str], text: str, override: str | None) -> None:
    write(text)
    answer = call(*verb, "-c", "run.yaml", *(["--set", override] if override else []))
    assert answer.code == 2
    assert CANARY not in answer.out + answer.err


def test_the_value_of_a_known_variable_is_recognised(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    found = problems(
        with_phases("run: {output_dir: 0123456789abcdef}").replace("0123", "'0123").replace("def}", "def'}")
    )
    assert found[0].startswith("run.yaml:3: run.output_dir: given a secret (not shown)")


def test_a_known_value_is_scrubbed_from_any_message(write: Write, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "my-own-password")
    write("model: {name: m}")
    answer = call("plan", "-c", "run.yaml", "--set", "lora.r=x my-own-password")
    assert answer.code == 2
    assert "my-own-password" not in answer.err


@pytest.mark.parametrize(
    "path",
    [
        "abfss://data@account.dfs.core.windows.net/x.jsonl", "hdfs://alice@namenode/x", "ssh://git@github.com/a/b.jsonl",
        "git@github.com:a/b", "s3://bucket/x", "hf://datasets/a/b@main/x", "sk-SK-slovak-corpus-of-texts-2021.jsonl",
        "data/sk-learn-documentation-corpus-2024-full/a.jsonl",
    ],
)  # fmt: skip
def test_innocent_places_are_no_secrets(loaded: Callable[..., Loaded], path: str) -> None:
    assert (
        loaded(f"model: {{name: m}}\nphases: [{{name: one, sources: '{path}'}}]").config.phases[0].sources[0].path
        == path
    )


def test_a_secret_is_refused_wherever_it_comes_from(write: Write, call: Call) -> None:
    plan = make_plan(load(write("model: {name: m}"), ["launch.num_gpus=1"]))
    Ledger.open(RunDir(Path("here")), plan)
    for override in (f"tracking.wandb.entity={CANARY}", "data.where={hf_token: my-own-password}"):
        answer = call("config", "show", "--run-dir", "here", "--set", override)
        assert answer.code == 2
        assert "given a secret (not shown)" in answer.err
        assert CANARY not in answer.err
    with pytest.raises(ConfigError, match="given a secret"):
        from_objects(RunConfig(model=Model(from_config={"hf_token": "abc"})))
    with pytest.raises(ConfigError) as refused:
        load(write("model: {name: m}"), [f"phases.{CANARY}.x=1", CANARY, f"model.name=!{CANARY} x"])
    assert CANARY not in str(refused.value)


@pytest.mark.parametrize(
    "typed", [["plan", f"--{CANARY}"], ["plan", CANARY], [CANARY], ["-c", CANARY], ["plan", "--json", CANARY]]
)
def test_a_secret_in_the_command_line_is_not_repeated_by_the_parser(call: Call, typed: list[str]) -> None:
    answer = call(*typed)
    assert answer.code == 2
    assert "given a secret (not shown); take it out of the command line" in answer.err
    assert CANARY not in answer.out + answer.err


def test_the_last_word_is_scrubbed_wherever_it_comes_from(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message about a file says where it was looked for."""
    (tmp_path / CANARY).mkdir()
    monkeypatch.chdir(tmp_path / CANARY)
    answer = call("plan", "-c", "nope.yaml")
    assert answer.err.startswith("nope.yaml: no such file (looked from ")
    assert CANARY not in answer.err


def test_a_key_of_github_is_not_sent_to_the_hub(problems: Problems) -> None:
    (told,) = problems(with_phases("data: {where: {github_token: abc}}"))
    assert "an environment variable (WANDB_API_KEY, HF_TOKEN)" in told


def test_innocent_words_are_no_secrets(loaded: Callable[..., Loaded]) -> None:
    config = loaded("""\
        model: {name: org/token-classifier, tokenizer: secret-garden}
        data: {max_tokens: 64, overlap_tokens: 8, where: {author: sk-learn, kind: password reset, pad_token: x}}
        phases: [{name: one, sources: a, tokens: 1000}]
    """).config
    assert config.model.tokenizer == "secret-garden"
