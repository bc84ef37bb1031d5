"""`phased-cpt preflight` as a shell sees it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phased_cpt import preflight
from phased_cpt.preflight import CHECKS, Scene
from phased_cpt.preflight.seen import Seen, fail, ok, skip, warn
from tests.conftest import REPOSITORY, Call
from tests.preflight.conftest import SHAPE, model_folder, seen_scene, written

HEAVY = ("torch", "adapter targets", "attention", "compiler", "collective")
PARENT = """
import sys
from phased_cpt.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    loaded = [name for name in ("torch", "transformers", "deepspeed", "peft") if name in sys.modules]
    sys.stderr.write(f"loaded here: {loaded}\\n")
    raise
"""


@pytest.fixture
def light(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks that start processes."""
    for name in HEAVY:
        monkeypatch.delitem(CHECKS, name)


def named(base: bool = True) -> dict[str, Any]:
    return {"model": {"name": model_folder(SHAPE | {"eos_token_id": 0}), "from_config": None}} if base else {}


@pytest.mark.requirement("P-04")
def test_all_of_it_in_a_shell_on_a_machine_without_gpus(here: Path) -> None:
    """The only one that starts everything: exit code 0, JSON alone on stdout, and torch in children only."""
    written(**named())
    shell = [sys.executable, "-c", PARENT, "preflight", "-c", "run.json", "--json", "--num-gpus", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(shell, capture_output=True, text=True, env=environment, check=False)
    facts = json.loads(answer.stdout)
    verdicts = {check["name"]: check["verdict"] for check in facts["checks"]}
    assert (answer.returncode, facts["verdict"], set(facts)) == (0, "warn", {"checks", "verdict", "fit"}), answer.stderr
    assert [name for name, verdict in verdicts.items() if verdict not in ("ok", "skip")] == ["GPUs"]
    assert list(verdicts) == list(CHECKS), "each of them has spoken"
    assert "loaded here: []" in answer.stderr
    assert "2 ranks over gloo" in next(each["found"] for each in facts["checks"] if each["name"] == "collective")
    assert [phase["phase"] for phase in facts["fit"]["phases"]] == ["one"]
    assert facts["fit"]["hardware"]["ranks"] == 2


def test_the_picture_before_a_launch(light: None, call: Call) -> None:
    written(**named())
    answer = call("preflight", "-c", "run.json", "--num-gpus", "2", "--set", "training.learning_rate=5e-5")
    assert answer.code == 0, answer.out + answer.err
    for words in (
        "ok    base", "model: ", "warn  GPUs", "4 rows", "1 × 2 × 2 ranks", "100 steps", "5e-5 → 0", "LoRA r 4",
        "64 tokens", "zero2 (ZeRO-2)", "2 ranks · no GPU", "documents end with <|endoftext|>", "reading the data …",
    ):  # fmt: skip
        assert words in answer.out + answer.err, words
    assert not list(Path("outputs").glob("small-*")), "no run is begun"


def test_a_failure_is_exit_3_with_the_names_of_the_checks(light: None, call: Call) -> None:
    written(**named(), phases=[{"name": "one", "sources": "nowhere.jsonl", "max_steps": 100}])
    answer = call("preflight", "-c", "run.json", "--json")
    checks = {check["name"]: check for check in json.loads(answer.out)["checks"]}
    assert answer.code == 3
    assert answer.err.splitlines()[-1] == "this run would fail: sources"
    assert checks["sources"]["verdict"] == "fail"
    assert checks["data"] == {
        "name": "data", "verdict": "skip", "found": "skipped, because a source is missing", "fix": "",
    }  # fmt: skip
    assert checks["base"]["verdict"] == "ok", "the others go on"


def test_a_configuration_that_is_wrong_is_exit_2_as_ever(light: None, call: Call) -> None:
    written(data={"max_token": 64})
    answer = call("preflight", "-c", "run.json", "--json")
    assert (answer.code, answer.out) == (2, "")
    assert "did you mean max_tokens?" in answer.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hostfile", "hosts"], "hosts:1: 'what a host'; a name and its number of GPUs are needed"),
        (["--nnodes", "2"], "--nnodes 2: add --master-addr"),
        (["--node-rank", "1"], "--node-rank 1: there is one node; add --nnodes N"),
        (["--redo-from", "on"], "--redo-from: no phase is called 'on'; did you mean one?"),
    ],
)
def test_what_contradicts_itself_is_exit_2_before_anything_is_looked_at(
    options: list[str], told: str, light: None, call: Call
) -> None:
    Path("hosts").write_text("what a host\n")
    answer = call("preflight", "-c", str(written()), *options)
    assert (answer.code, answer.out) == (2, "")
    assert told in answer.err


def test_the_second_call_remembers_the_data_and_the_base(here: Path) -> None:
    def data(scene: Scene) -> list[Seen]:
        return list(CHECKS["data"](scene))

    named_base = named()
    (first,), (second,) = data(seen_scene(**named_base)), data(seen_scene(**named_base))
    assert ("(remembered)" in first.found, "(remembered)" in second.found) == (False, True)
    Path("a.jsonl").write_text('{"text": "other words"}\n' * 30)
    (changed,) = data(seen_scene(**named_base))
    assert "(remembered)" not in changed.found, "the control: by its bytes, and not by its name"


def test_no_check_brings_down_the_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(scene: Scene) -> Iterator[Seen]:
        yield ok("as far as this")
        raise ZeroDivisionError("of a library")

    for name in list(CHECKS):
        monkeypatch.delitem(CHECKS, name)
    monkeypatch.setitem(CHECKS, "first", breaks)
    monkeypatch.setitem(CHECKS, "second", lambda scene: iter([ok("all is well")]))
    scene = seen_scene()
    findings = preflight.looked(scene)
    assert [(each.name, each.verdict, each.found) for each in findings] == [
        ("first", "ok", "as far as this"),
        ("first", "fail", "ZeroDivisionError: of a library"),
        ("second", "ok", "all is well"),
    ]


def test_every_check_is_on_its_page() -> None:
    rows = (REPOSITORY / "docs/preflight.md").read_text().partition("## The checks")[2].splitlines()
    named = [
        name for row in rows if row.startswith("| ") for name in row.split(" | ")[0].removeprefix("| ").split(", ")
    ]
    assert sorted(named[1:]) == sorted(CHECKS)


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [([ok("a")], "ok"), ([ok("a"), skip("b")], "ok"), ([warn("a", "b"), skip("c")], "warn"), ([fail("a", "b"), warn("c", "d")], "fail")],
)  # fmt: skip
def test_the_worst_verdict_is_that_of_all(
    seen: list[Seen], verdict: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(CHECKS):
        monkeypatch.delitem(CHECKS, name)
    monkeypatch.setitem(CHECKS, "one", lambda scene: iter(seen))
    scene = seen_scene()
    assert preflight.answer(preflight.looked(scene), scene)["verdict"] == verdict
