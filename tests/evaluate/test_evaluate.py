"""The verb on a run: its figures are those of training, and what cannot be measured is told."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Write
from tests.evaluate.conftest import SOURCES, Evaluate, models, trained
from tests.journeys.conftest import zygote  # noqa: F401 - a fixture
from tests.zygote import Zygote

pytestmark = pytest.mark.requirement("E-04")

FOLDERS = {"foundation": "phase1_foundation", "evolution": "phase2_evolution"}
QUESTIONS = """\
    {"prompt": "What is a row called?", "answer": ["a block", "block"]}
    {"prompt": "What ends a document?", "answer": "EOS"}
"""


def final(run: Path, phase: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / FOLDERS[phase] / "eval_final.json").read_text())
    return found


def figures(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("eval_loss", "perplexity", "tokens")}


def test_every_model_is_measured_on_what_every_phase_holds_out(run: Path, evaluate: Evaluate) -> None:
    """Were other rows measured, or an adapter on that is not meant, no figure would be that of training."""
    found = {name: facts["held_out"] for name, facts in models(evaluate("--run-dir", run, "--json")).items()}
    assert list(found) == ["base", "foundation", "evolution", "merged"]
    assert all(list(facts) == list(SOURCES) for facts in found.values())
    for phase in SOURCES:
        assert found[phase][phase] == pytest.approx(figures(final(run, phase)), rel=1e-5)
    assert found["base"]["foundation"] == pytest.approx(figures(final(run, "foundation")["start"]), rel=1e-5)
    assert found["foundation"]["evolution"] == pytest.approx(figures(final(run, "evolution")["start"]), rel=1e-5)
    assert found["merged"] == {name: pytest.approx(facts, rel=1e-4) for name, facts in found["evolution"].items()}
    losses = [facts["eval_loss"] for name in ("base", *SOURCES) for facts in found[name].values()]
    assert all(abs(one - other) > 1e-3 for at, one in enumerate(losses) for other in losses[:at]), "all differ"
    assert found["base"]["foundation"]["perplexity"] == pytest.approx(
        math.exp(found["base"]["foundation"]["eval_loss"])
    )


def test_the_table_has_a_line_a_model_and_a_column_a_measure(run: Path, evaluate: Evaluate, write: Write) -> None:
    answer = evaluate("--run-dir", run, "--questions", write(QUESTIONS, "q.jsonl"))
    lines = [line.split() for line in answer.out.splitlines() if line]
    assert lines[0][:4] == ["perplexity", "of", "held-out", "documents"]
    assert lines[1] == ["model", "foundation", "evolution"]
    assert [line[0] for line in lines[2:6]] == ["base", "foundation", "evolution", "merged"]
    assert lines[3][1] == f"{final(run, 'foundation')['perplexity']:,.1f}"
    assert lines[6] == ["answers", "to", "2", "questions"]
    assert lines[7] == ["model", "exact", "match", "token", "accuracy", "ROUGE-L"]
    assert [line[0] for line in lines[8:]] == ["base", "foundation", "evolution", "merged"]


def test_questions_are_asked_and_every_answer_is_kept(run: Path, evaluate: Evaluate, write: Write) -> None:
    """What a model is known to say is right, and what it does not say is wrong."""
    wanted = ("--run-dir", run, "--only", "evolution", "--json")
    long = {"prompt": "What is a row called?", "answer": "tokens " * 60}  # half of the context is left for it
    first = models(evaluate(*wanted, "--questions", write(json.dumps(long), "q.jsonl")))["evolution"]["questions"]
    said = first["answers"][0]["said"]
    assert len(said) > 100 and first["exact_match"] == 0 and first["rouge_l"] < 1
    known = [long | {"answer": ["not this", f"  {said}"]}, {"prompt": "?", "answer": "§"}]
    known += [long | {"answer": f"  {said}"}, long | {"answer": "not this"}]
    answer = evaluate(*wanted, "--questions", write("\n".join(map(json.dumps, known)), "known.jsonl"))
    second = models(answer)["evolution"]["questions"]
    assert [each["exact_match"] for each in second["answers"]] == [1, 0, 1, 0]
    assert [each["question"] for each in second["answers"]] == [f"known.jsonl:{line}" for line in (1, 2, 3, 4)]
    assert second["answers"][0]["rouge_l"] == 1
    shares = [each["token_accuracy"] for each in second["answers"]]
    assert shares[0] == max(shares[2:]) > min(shares[2:]), "of several answers the nearest"
    assert (second["exact_match"], second["questions"]) == (0.5, 4)
    assert second["token_accuracy"] == pytest.approx(sum(shares) / 4)
    assert [each["answers"] for each in json.loads(answer.out)["questions"]][:2] == [known[0]["answer"], ["§"]]
    limited = models(evaluate(*wanted, "--limit", 1, "--questions", "known.jsonl"))["evolution"]["questions"]
    assert limited["answers"] == second["answers"][:1]


def test_an_adapter_and_a_model_from_anywhere_are_asked(run: Path, evaluate: Evaluate, write: Write) -> None:
    write(QUESTIONS, "q.jsonl")
    asked = ("--questions", "q.jsonl", "--json")
    of_run = models(evaluate("--run-dir", run, *asked))
    adapter = evaluate("--adapter", run / "phase2_evolution/best_adapter", "--base", run / "random_base", *asked)
    assert "held-out perplexity is not measured: held-out documents are those of a run" in adapter.err
    found = models(adapter)
    assert found["base"] == {"questions": of_run["base"]["questions"]}
    assert found["adapter"] == {"questions": of_run["evolution"]["questions"]} != found["base"]
    assert json.loads(adapter.out)["skipped"]["held_out"].startswith("held-out documents are those of a run")
    shutil.copytree(run / "random_base", "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / "tokenizer" / name, "whole")
    assert models(evaluate("--model", "whole", *asked)) == {"whole": found["base"]}
    assert evaluate("--model", "whole").code == 2, "nothing is left to measure"


def test_only_some_are_measured(run: Path, evaluate: Evaluate) -> None:
    assert list(models(evaluate("--run-dir", run, "--only", "evolution", "--only", "base", "--json"))) == [
        "base",
        "evolution",
    ]
    answer = evaluate("--run-dir", run, "--only", "evolutoin", "--json")
    assert (answer.code, answer.out) == (2, "")
    assert "--only evolutoin: there is base, foundation, evolution, merged; did you mean evolution?" in answer.err


@pytest.fixture
def source(run: Path) -> Iterator[Path]:
    """What the second phase was trained on; put back as it was."""
    path = run.parent / SOURCES["evolution"]
    before = path.read_bytes()
    yield path
    path.write_bytes(before)


def test_data_that_has_changed_or_is_gone_is_named(run: Path, source: Path, evaluate: Evaluate, write: Write) -> None:
    """A perplexity of other documents beside that of training would look like learning."""
    before = source.read_bytes()
    source.write_bytes(before + b'{"training_content": "one more"}\n')
    answer = evaluate("--run-dir", run)
    assert (answer.code, answer.out) == (2, "")
    assert f"phases.evolution.sources.0: {source}: its documents are not those" in answer.err
    source.unlink()
    answer = evaluate("--run-dir", run)
    assert (answer.code, answer.out) == (2, "")
    assert f"phases.evolution.sources: {source}: no such file" in answer.err and "--questions FILE" in answer.err
    answer = evaluate("--run-dir", run, "--questions", write(QUESTIONS, "q.jsonl"), "--json")
    assert [list(facts) for facts in models(answer).values()] == [["questions"]] * 4
    assert str(source) in json.loads(answer.out)["skipped"]["held_out"]
    source.write_bytes(before)
    assert models(evaluate("--run-dir", run, "--json"))["base"]["held_out"], "and put back, it is measured"


def test_a_run_without_held_out_data_says_so(
    zygote: Zygote,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    evaluate: Evaluate,
    write: Write,
) -> None:
    run = trained(zygote, tmp_path_factory.mktemp("none"), ranks=1, eval_share=0)
    answer = evaluate("--run-dir", run)
    assert answer.code == 2 and "this run holds nothing out (data.eval_share is 0" in answer.err
    answer = evaluate("--run-dir", run, "--questions", write(QUESTIONS, "q.jsonl"))
    assert answer.code == 0
    assert "held-out perplexity is not measured" in answer.out and "answers to 2 questions" in answer.out


def test_a_broken_model_is_no_number_and_valid_json(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    """NaN is not JSON, and exp of a loss of a thousand is no number."""
    from phased_cpt.tables.evaluation import evaluation_table, valid
    from phased_cpt.tables.words import shown

    facts = valid(
        {
            "models": {
                "base": {"held_out": {"a": {"eval_loss": math.nan, "perplexity": math.nan, "tokens": 3}}},
                "tuned": {"held_out": {"a": {"eval_loss": 1000.0, "perplexity": None, "tokens": 3}}},
                "wild": {"held_out": {"a": {"eval_loss": 20.0, "perplexity": math.exp(20), "tokens": 3}}},
            },
            "skipped": {},
            "deep": [{"x": (math.inf, 1)}],
        }
    )
    assert facts["models"]["base"]["held_out"]["a"] == {"eval_loss": None, "perplexity": None, "tokens": 3}
    assert facts["deep"] == [{"x": [None, 1]}]
    lines = [line.split(maxsplit=1) for line in shown(evaluation_table(facts)).splitlines()]
    assert [(name, rest.strip()) for name, rest in lines[2:5]] == [
        ("base", "no number"),
        ("tuned", "beyond numbers"),
        ("wild", "4.85165e+08"),
    ]
