"""The verbs, as a shell sees them: what is typed, what comes back, and with which exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from phased_cpt.argv import normalise
from phased_cpt.cli import app
from phased_cpt.config import load
from phased_cpt.errors import InputError
from phased_cpt.ledger import Ledger
from phased_cpt.plan import make_plan
from phased_cpt.run_dir import RunDir
from tests.conftest import MINIMAL, REPOSITORY, Call, Write

SHELL = [sys.executable, "-m", "phased_cpt"]


@pytest.mark.requirement("C-01")
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("plan -c a.yaml", "plan -c a.yaml"),
        ("-c a.yaml plan", "plan -c a.yaml"),
        ("--config=a.yaml --set x=1 plan --json", "plan --config=a.yaml --set x=1 --json"),
        ("-c a.yaml", "run -c a.yaml"),
        ("-ca.yaml", "run -ca.yaml"),
        ("-c a.yaml --dry-run", "run -c a.yaml --dry-run"),
        ("--new -c a.yaml", "run --new -c a.yaml"),
        ("--redo-from two -c a.yaml", "run --redo-from two -c a.yaml"),
        ("--local_rank=0 -c a.yaml", "run -c a.yaml"),
        ("--local_rank 0 -c a.yaml plan", "plan -c a.yaml"),
        ("--local-rank=0 plan -c a.yaml", "plan -c a.yaml"),
        ("-c a.yaml config show", "config show -c a.yaml"),
        ("-c plan plan", "plan -c plan"),
        ("config --help", "config --help"),
        ("config -c a.yaml show --json", "config show -c a.yaml --json"),
        ("plan -c a.yaml --local_rank 0", "plan -c a.yaml"),
        ("-c a.yaml --version", "--version"),
        ("--help", "--help"),
        ("-h", "-h"),
        ("--version", "--version"),
        ("", ""),
    ],
)
def test_what_is_typed_becomes_a_verb_and_its_options(typed: str, meant: str) -> None:
    assert normalise(typed.split(), get_command(app)) == meant.split()


def test_a_verb_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError,
        match=r"no verb 'stauts'; did you mean status\? \(verbs: plan, run, status, prepare, preflight, merge, evaluate, chat, sweep-lambda, soup, report, config, tokenizer, dataset; -h explains them\)",
    ):
        normalise(["stauts"], get_command(app))


def verbs(group: TyperGroup, path: str = "") -> Iterator[str]:
    for name, verb in group.commands.items():
        yield from verbs(verb, f"{name} ") if isinstance(verb, TyperGroup) else [path + name]


NO_RUN = ("config schema", "tokenizer train")  # are about no run


@pytest.mark.parametrize("verb", [verb for verb in verbs(get_command(app)) if verb not in NO_RUN])
def test_every_verb_takes_the_same_three_options(call: Call, verb: str) -> None:
    help_text = call(*verb.split(), "--help").out
    assert all(option in help_text for option in ("--config", "--set", "--run-dir"))


def test_plan_shows_the_phases_and_what_was_set(write: Write, call: Call) -> None:
    write("""\
        run: {name: tales}
        model: {name: some/model}
        launch: {num_gpus: 8}
        phases:
          - {name: foundation, sources: [a.jsonl, b.jsonl], epochs: 3}
          - name: evolution
            sources: {path: c.jsonl, weight: 0.5}
            max_steps: 500
            replay: {foundation: 0.1}
            training: {learning_rate: 5e-5}
    """)
    answer = call("plan", "-c", "run.yaml", "--set", "run.seed=7")
    assert answer.code == 0
    for words in (
        "tales: 2 phases on some/model (bf16)",
        "LoRA r 128, alpha 256 (scale 2), dropout 0.05",
        "starts from some/model",
        "starts from foundation's adapter",
        "c.jsonl × 0.5",
        "deepspeed auto",
        "seed 7 (command line)",
        "replay {foundation: 0.1}",
        "b.jsonl",
        "3 epochs",
        "? steps yet",
        "500 steps",
        "48 rows",
        "1 × 6 × 8 ranks",
        "5e-5 → 0",
        "cosine",
        "warm-up 3%",
        "32,768 tokens",
        "best_fit",
        "training.learning_rate 5e-5 (the run: 1e-4)  run.yaml:10 (phase)",
        "? steps: they follow from epochs and tokens; `phased-cpt prepare` tells them.",
    ):
        assert words in answer.out


def test_plan_tells_a_program_the_same(write: Write, call: Call) -> None:
    write(MINIMAL)
    override = ["--set", "run.name=tales", "--set", "phases.evolution.training.learning_rate=5e-5"]
    facts = json.loads(call("plan", "-c", "run.yaml", "--json", *override).out)
    assert facts["run"]["name"] == "tales"
    assert [phase["name"] for phase in facts["phases"]] == ["foundation", "evolution"]
    rates = [phase["training"]["learning_rate"] for phase in facts["phases"]]
    assert rates[0] == {"value": 1e-4, "origin": "default", "place": ""}
    assert rates[1] == {"value": 5e-5, "origin": "command line", "place": ""}
    assert facts["phases"][0]["model"]["name"] == {"value": "some/model", "origin": "file", "place": "run.yaml:1"}
    assert facts["tracking"]["wandb"]["enabled"] == {"value": False, "origin": "default", "place": ""}
    assert (facts["phases"][1]["starts_from"], facts["phases"][1]["steps"]) == ("foundation's adapter", None)
    assert facts["phases"][0]["batch"] == {"rows": None, "micro_batch_size": 1, "accumulation": None, "ranks": None}
    more = ["--set", "launch.num_gpus=2", "--set", "phases.evolution.max_steps=100"]
    known = json.loads(call("plan", "-c", "run.yaml", "--json", *more).out)["phases"][1]
    assert known["batch"] == {"rows": 12, "micro_batch_size": 1, "accumulation": 6, "ranks": 2}
    assert (known["steps"], known["warmup_steps"]) == (100, 3)
    assert facts["phases"][1]["checkpoint"]["every_steps"] == {"value": 50, "origin": "default", "place": ""}
    assert facts["run"]["origins"]["seed"] == {"value": 42, "origin": "default", "place": ""}
    assert facts["phases"][0]["phase"]["sources"]["origin"] == "file"
    assert facts["phases"][0]["phase"]["handover"] == {"value": "continue", "origin": "default", "place": ""}


@pytest.mark.requirement("C-06")
def test_config_show_prints_a_configuration_that_can_be_run(write: Write, call: Call) -> None:
    write(MINIMAL)
    shown = call("config", "show", "-c", "run.yaml", "--set", "lora.r=4").out
    write(shown, "shown.yaml")
    assert load("shown.yaml").config.lora.r == 4
    facts = json.loads(call("config", "show", "-c", "run.yaml", "--set", "lora.r=4", "--json").out)
    assert facts["lora.r"] == {"value": 4, "origin": "command line", "place": ""}
    assert facts["phases.foundation.lora.r"]["value"] == 4


def test_what_config_show_prints_can_still_be_told_something(write: Write, call: Call) -> None:
    write(MINIMAL)
    write(call("config", "show", "-c", "run.yaml", "--set", "phases.0.training.weight_decay=0").out, "shown.yaml")
    phases = make_plan(load("shown.yaml", ["training.learning_rate=7e-3"])).phases
    assert [phase.settings.training.learning_rate for phase in phases] == [7e-3, 7e-3]
    assert [phase.settings.training.weight_decay for phase in phases] == [0, 0.1]


def test_what_the_system_refuses_is_told_with_its_place(write: Write, call: Call) -> None:
    write(MINIMAL)
    name = "a" * 300
    assert call("plan", "-c", name)[::2] == (1, f"{name}: File name too long\n")
    assert call("status", "--run-dir", name).err.endswith("File name too long\n")


def test_config_schema_prints_the_shipped_schema(call: Call) -> None:
    assert json.loads(call("config", "schema").out) == json.loads((REPOSITORY / "configs/schema.json").read_text())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("plan", "no configuration is named: add `-c FILE`, or `-c demo` to look at a shipped one"),
        ("plan -c nope.yaml", "nope.yaml: no such file"),
        ("plan -c rnu.yaml", "did you mean run.yaml?"),
        ("plan -c run.yaml --set lora.r=0", "--set: lora.r: given 0; allowed: a whole number ≥ 1"),
        ("plan -c run.yaml --set training.global_batch_size=7 --set launch.num_gpus=2",
         "--set: training.global_batch_size: global_batch_size 7 is no multiple of micro_batch_size 1 × num_gpus 2"),
        ("run -c run.yaml --redo-from one", "--redo-from: no run has begun yet that could be redone; leave it out"),
        ("status --run-dir nowhere", "nowhere: no such run folder; name another, or its configuration with -c"),
        ("status", "no run in outputs/ yet; name one with --run-dir"),
        ("plan --run-dir nowhere", "nowhere: no run has begun here; add its configuration with -c"),
        ("plan --jsno", "--jsno"),
        ("plan run.yaml", "a configuration is named with -c: did you mean `-c run.yaml`?"),
        ("run.yaml", "a configuration is named with -c: did you mean `-c run.yaml`?"),
        ("plan -c empty/demo.yaml", "; did you mean demo?"),
        ("status -c run.yaml", "no run of run.yaml has begun yet; `phased-cpt run` with the same options begins one"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_message_on_stderr_and_exit_2(write: Write, call: Call, typed: str, message: str) -> None:
    write(MINIMAL)
    answer = call(*typed.split())
    assert answer.code == 2
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""


def test_a_dry_run_says_where_it_would_write_and_writes_nothing(write: Write, call: Call, tmp_path: Path) -> None:
    write(MINIMAL)
    answer = call("run", "-c", "run.yaml", "--set", "run.name=tales", "--dry-run")
    assert answer.code == 0
    assert "outputs/tales-2" in answer.out
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_what_cannot_be_trained_is_refused_before_a_run_begins(
    write: Write, call: Call, config: Callable[..., Path]
) -> None:
    """Before its data is made, which may take hours; no run folder is left."""
    write('{"text": "one"}\n{"text": "two"}\n', "a.jsonl")
    write('{"zero_optimization": {"stage": 1}}', "mine.json")
    answer = call("-c", str(config("a.jsonl")), "--set", "training.deepspeed=mine.json")
    assert answer.code == 2
    assert "mine.json: zero_optimization.stage is 1" in answer.err
    assert not Path("outputs").exists()


def test_a_dry_run_against_a_ledger_that_does_not_match_is_refused_with_exit_4(write: Write, call: Call) -> None:
    from tests.ledger.test_book import begin_all

    plan = make_plan(load(write(MINIMAL), ["run.dir=here", "launch.num_gpus=1"]))
    begin_all(Ledger.open(RunDir(Path("here")), plan), plan)
    same = ["run", "-c", "run.yaml", "--run-dir", "here", "--set", "launch.num_gpus=1", "--dry-run"]
    assert call(*same).code == 0
    changed = call(*same, "--set", "training.weight_decay=0.5")
    assert changed.code == 4
    assert "phase foundation is done, with other values than it has now:" in changed.err
    assert "    training.weight_decay: was 0.1, is 0.5" in changed.err
    assert "`--new`" in changed.err
    assert "`--redo-from foundation`" in changed.err
    assert call(*same, "--set", "training.weight_decay=0.5", "--redo-from", "foundation").code == 0


def test_the_short_help_option_works(call: Call) -> None:
    assert call("plan", "-h").out == call("plan", "--help").out


def test_version_is_printed(call: Call) -> None:
    assert call("--version").out.startswith("phased-cpt 0.")


# In a process of its own ---------------------------------------------------------------------------------------------


def test_plan_answers_without_importing_torch(tmp_path: Path) -> None:
    run = [sys.executable, "-X", "importtime", "-m", "phased_cpt", "plan", "-c", str(REPOSITORY / "configs/demo.yaml")]
    answer = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines()}
    assert "pydantic" in imported, "the list is not empty"
    assert imported.isdisjoint({"torch", "transformers", "deepspeed", "peft", "accelerate", "bitsandbytes", "datasets"})


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = '"$0" -m phased_cpt config schema | head -c 1; exit ${PIPESTATUS[0]}'
    answer = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True, cwd=tmp_path)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "{", "")


def test_a_bad_configuration_ends_a_real_process_with_2_and_no_traceback(write: Write) -> None:
    write("run: [")
    answer = subprocess.run([*SHELL, "plan", "-c", "run.yaml", "--json"], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("run.yaml:1: not valid YAML")
    assert len(answer.stderr.splitlines()) == 1


def test_a_failure_keeps_its_exit_code_where_nobody_reads_any_more() -> None:
    """`phased-cpt run … 2>&1 | tee log`: a Ctrl-C ends the tee as well."""
    reads, writes = os.pipe()
    os.close(reads)
    called = subprocess.run(
        [sys.executable, "-m", "phased_cpt", "run", "-c", "nope.yaml"], stdout=writes, stderr=writes
    )
    os.close(writes)
    assert called.returncode == 2
