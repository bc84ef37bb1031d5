"""How much of a run to keep: what is measured at each λ, and what is chosen."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phased_cpt.__main__ import Rooms
from phased_cpt.cli import main
from phased_cpt.evaluate.sweep import facts_of
from phased_cpt.tables.sweep import sweep_table
from phased_cpt.tables.words import shown
from tests.conftest import Answer
from tests.evaluate.conftest import SOURCES, Evaluate, models
from tests.journeys.conftest import zygote  # noqa: F401 - a fixture
from tests.merge.conftest import _quick  # noqa: F401 - a fixture

Typed = Callable[..., Answer]

SETS: Any = {name: SimpleNamespace(is_general=name == "wiki") for name in ("one", "two", "wiki")}
TOKENS = {"one": 100, "two": 300, "wiki": 50}


def losses(one: float, two: float, wiki: float) -> dict[str, Any]:
    return {
        name: {"eval_loss": loss, "tokens": TOKENS[name]} for name, loss in zip(TOKENS, (one, two, wiki), strict=True)
    }


def test_the_lowest_mean_over_tokens_is_chosen_and_drift_is_shown_beside_it() -> None:
    """By the mean over sets 0.5 would be the best; by tokens it is 1, as `two` has three times as many."""
    found = {0.0: losses(4, 4, 3), 0.5: losses(2, 3, 3.1), 1.0: losses(2.8, 2.7, 3.1)}
    facts = facts_of(found, ["one", "two"], SETS)
    taught = [36, 24.75, 24.525]  # nats over their 9 tokens, were there no others
    wiki = [3, 3.1, 3.1]
    tokens = {each["name"]: each["tokens"] for each in facts["sets"]}
    assert tokens["wiki"] and facts["mean_of"] == ["one", "two", "wiki"]
    whole = tokens["one"] + tokens["two"]
    means = [
        (each / 9 * whole + one * tokens["wiki"]) / (whole + tokens["wiki"])
        for each, one in zip(taught, wiki, strict=True)
    ]
    assert [line["mean"] for line in facts["strengths"]] == pytest.approx(means)
    assert facts["chosen"] == 1.0
    forgets = found | {1.0: losses(2.8, 2.7, 9.5)}
    assert facts_of(forgets, ["one", "two"], SETS)["chosen"] == 0.5, "what the base knew counts, too"
    assert [line["drift"]["wiki"] for line in facts["strengths"]] == pytest.approx([0, 0.1, 0.1])
    assert facts_of(found, ["one"], SETS)["chosen"] == 0.5, "of the first phase alone"
    table = shown(sweep_table(facts | {"phase": "two"}))
    assert [line.split()[0] for line in table.splitlines()[1:5]] == ["λ", "0", "0.5", "1"]
    assert "as published ← chosen" in table and "wiki, drift" in table and "+0.1000" in table


def test_of_equals_the_most_is_kept_and_what_is_no_number_is_not_chosen() -> None:
    same = {0.0: losses(3, 3, 3), 0.5: losses(2, 2, 3), 1.0: losses(2, 2, 3)}
    assert facts_of(same, ["one", "two"], SETS)["chosen"] == 1.0
    broken = same | {1.0: losses(float("nan"), 2, 3)}
    assert facts_of(broken, ["one", "two"], SETS)["chosen"] == 0.5


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """A verb, in this process; a merge, too."""
    from phased_cpt import merging
    from phased_cpt.data.watch import Unwatched
    from phased_cpt.merge.story import merge

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(merging, "_run", lambda job: merge(job, Unwatched()))

    def called(*words: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*map(str, words)], rooms=Rooms())
        return Answer(int(stop.value.code or 0), *capsys.readouterr())

    return called


@pytest.mark.requirement("E-04")
def test_nothing_of_it_is_the_base_all_of_it_what_was_published_and_the_choice_is_never_worse(
    run: Path, typed: Typed, evaluate: Evaluate
) -> None:
    answer = typed("sweep-lambda", "--run-dir", run, "--lambda", "0.5,0.9", "--device", "cpu", "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    lines = {line["lambda"]: line for line in facts["strengths"]}
    assert list(lines) == [0, 0.5, 0.9, 1] and facts["phase"] == "evolution"
    measured = models(evaluate("--run-dir", run, "--json"))
    for name, strength in (("base", 0), ("evolution", 1)):
        for of in SOURCES:
            assert lines[strength]["losses"][of] == pytest.approx(measured[name]["held_out"][of]["eval_loss"], rel=1e-7)
    assert lines[facts["chosen"]]["mean"] <= min(line["mean"] for line in lines.values())
    assert len({line["mean"] for line in lines.values()}) == 4, "the control: every λ is another model"

    first = json.loads(typed("sweep-lambda", "--run-dir", run, "--phase", "foundation", "--lambda", "1", "--device", "cpu", "--json").out)  # fmt: skip
    assert first["mean_of"] == ["foundation"] and [line["lambda"] for line in first["strengths"]] == [0, 1]
    assert first["strengths"][1]["losses"]["evolution"] == pytest.approx(measured["foundation"]["held_out"]["evolution"]["eval_loss"])  # fmt: skip


@pytest.mark.requirement("M-03")
def test_what_is_written_loses_what_was_measured_for_it(run: Path, typed: Typed, evaluate: Evaluate) -> None:
    """Were both factors scaled, 0.5 would be a quarter: the model of λ = 0.25, which the sweep has as well."""
    answer = typed("sweep-lambda", "--run-dir", run, "--lambda", "0.25,0.5", "--device", "cpu", "--write", "best", "--out", "kept", "--json")  # fmt: skip
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert facts["lambda"] == facts["chosen"] and facts["written"]["folder"] == str(Path("kept").resolve())
    answer = typed("sweep-lambda", "--run-dir", run, "--write", "0.5", "--out", "half")
    assert answer.code == 0 and "λ" not in answer.out and 'from_pretrained("' in answer.out, answer.err
    assert "0.5 × phase2_evolution/best_adapter" in Path("half/README.md").read_text()
    lines = {line["lambda"]: line["losses"] for line in facts["strengths"]}
    measured = _of_folder(run, Path("half"))
    assert measured == pytest.approx(lines[0.5], rel=1e-6)
    assert abs(measured["foundation"] - lines[0.25]["foundation"]) > 1e-3, "the control"


def _of_folder(run: Path, folder: Path) -> dict[str, float]:
    """What a plain Transformers folder loses on what a run holds out."""
    import torch

    from phased_cpt.evaluate.course import Course
    from phased_cpt.evaluate.held_out import held_out_sets, measured
    from phased_cpt.model.lineup import line_up, read_run
    from phased_cpt.wanted import ModelsWanted

    course = Course()
    sets = held_out_sets(*read_run(run, None), course.watcher)
    with line_up(ModelsWanted(model=folder, device="cpu"), tell=print).as_(folder.name) as model:
        found = measured(model, sets, torch.device("cpu"), course)
    return {name: each["eval_loss"] for name, each in found.items()}


@pytest.mark.requirement("M-03")
def test_a_soup_of_phases_is_one_model_or_one_adapter(run: Path, typed: Typed, evaluate: Evaluate) -> None:
    parts = ("--run-dir", run, "--weight", "foundation=0.3", "--weight", "evolution=0.7")
    answer = typed("soup", *parts, "--out", "whole", "--json")
    assert answer.code == 0, answer.err
    assert [each["scale"] for each in json.loads(answer.out)["adapters"]] == [0.3, 0.7]
    answer = typed("soup", *parts, "--out", "one", "--adapter-only")
    assert answer.code == 0 and "rank 8" in answer.out and "0.3 × phase1_foundation/best_adapter" in answer.out
    answer = typed("merge", "--base", run / "random_base", "--adapter", "one", "--out", "merged", "--dtype", "fp32")
    assert answer.code == 0, answer.err
    whole, merged = _of_folder(run, Path("whole")), _of_folder(run, Path("merged"))
    assert whole == pytest.approx(merged, rel=1e-6)
    alone = models(evaluate("--run-dir", run, "--json"))
    for name in SOURCES:
        assert max(abs(whole[of] - alone[name]["held_out"][of]["eval_loss"]) for of in SOURCES) > 1e-3, "the control"

    folders = [run / f"phase{at}_{name}/best_adapter" for at, name in enumerate(SOURCES, 1)]
    answer = typed("soup", "--base", run / "random_base", "--adapter", f"{folders[0]}=0.3", "--adapter", f"{folders[1]}=0.7", "--out", "two", "--adapter-only", "--json")  # fmt: skip
    assert answer.code == 0 and Path("two/adapter_model.safetensors").read_bytes() == Path("one/adapter_model.safetensors").read_bytes()  # fmt: skip


REFUSED = {
    "soup --weight foundation=0.3": "--out DIR",
    "soup --out x": "--weight PHASE=0.3",
    "soup --weight foundation --out x": "--weight foundation=0.5",
    "soup --weight foundation=much --out x": "a number is wanted",
    "soup --weight evolutoin=1 --out x": "did you mean evolution?",
    "soup --weight evolution=1 --weight evolution=1 --out x": "named twice",
    "soup --weight evolution=nan --out x": "a number is wanted",
    "sweep-lambda --lambda 0.3,,1": "a number is wanted",
    "sweep-lambda --write 0.5": "--write 0.7 --out DIR",
    "sweep-lambda --out x": "--write 0.7 --out DIR",
    "sweep-lambda --phase foundatoin": "did you mean foundation?",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_typed_wrongly_is_told_before_anything_is_loaded(words: str, run: Path, typed: Typed) -> None:
    verb, *rest = words.split()
    answer = typed(verb, "--run-dir", run, *rest)
    assert answer.code == 2 and REFUSED[words] in answer.err and "Traceback" not in answer.err
    assert not Path("x").exists()
    answer = typed("soup", "--adapter", f"{run}/phase1_foundation/best_adapter=1", "--out", "x")
    assert answer.code == 2 and "--base MODEL" in answer.err
