"""Tasks of lm-evaluation-harness, of which one lies here: its figures are those of the models that are loaded."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phased_cpt.evaluate import tasks
from phased_cpt.model.lineup import line_up
from phased_cpt.wanted import ModelsWanted
from tests.conftest import Write
from tests.evaluate.conftest import Evaluate, models

pytestmark = pytest.mark.requirement("E-04")

DOCUMENTS = [
    {"question": f"Which one, {at}?", "choices": [f" a{at}", f" row {at}", f" of {at} tokens"], "right": at % 3}
    for at in range(8)
]
TASK = """\
    task: which_one
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {folder}/which.jsonl}}, cache_dir: {folder}/cache}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{{{question}}}}"
    doc_to_choice: choices
    doc_to_target: right
    target_delimiter: ""
    metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def own(write: Write, tmp_path: Path) -> Path:
    """A folder with a task."""
    write("\n".join(map(json.dumps, DOCUMENTS)), "own/which.jsonl")
    return write(TASK.format(folder=tmp_path / "own"), "own/which.yaml").parent


def accuracy(model: Any, tokenizer: Any, documents: list[dict[str, Any]]) -> float:
    """How often the right choice is the likeliest, counted here."""
    right = 0
    for document in documents:
        sums = []
        for choice in document["choices"]:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (document["question"], f"{document['question']}{choice}"))  # fmt: skip
            with torch.no_grad():
                logits = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[at - 1, whole[at]]) for at in range(len(prompt), len(whole))))
        right += sums.index(max(sums)) == document["right"]
    return right / len(documents)


def test_a_task_of_ones_own_is_measured_on_every_model(
    run: Path, own: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(known, "TaskManager", functools.cache(known.TaskManager))  # five seconds each
    wanted = ("--run-dir", run, "--task", "which_one", "--include-path", own)
    found, of_three = models(evaluate(*wanted, "--json")), models(evaluate(*wanted, "--limit", 3, "--json"))
    lineup = line_up(ModelsWanted(run_dir=run, device="cpu"), tell=lambda message: None)
    for name in lineup.names:
        with lineup.as_(name) as model:
            assert found[name]["tasks"]["which_one"]["acc"] == accuracy(model, lineup.tokenizer, DOCUMENTS)
            assert of_three[name]["tasks"]["which_one"]["acc"] == accuracy(model, lineup.tokenizer, DOCUMENTS[:3])
    assert [facts["tasks"] for facts in found.values()] != [facts["tasks"] for facts in of_three.values()]
    assert len({facts["tasks"]["which_one"]["acc"] for facts in found.values()}) > 1, "or it is always the same model"
    assert found["base"]["tasks"]["which_one"]["acc_stderr"] > 0
    assert all("held_out" in facts for facts in found.values())
    lines = evaluate(*wanted, "--limit", 2, "--only", "base").out.splitlines()
    at = lines.index("tasks of lm-evaluation-harness")
    assert lines[at + 1].split() == ["model", "which_one", "acc"]
    assert lines[at + 2].split()[0] == "base"
    unknown = evaluate("--run-dir", run, "--task", "which_on", "--include-path", own)
    assert (unknown.code, unknown.out) == (2, "")
    assert "--task which_on: no such task; did you mean which_one?" in unknown.err
    (own / "which.yaml").write_text((own / "which.yaml").read_text().replace("which.jsonl", "nix.jsonl"))
    gone = evaluate("--run-dir", run, "--task", "which_one", "--include-path", own)
    assert (gone.code, gone.out) == (2, "")
    assert "--task which_one: the harness cannot load it: " in gone.err and "nix.jsonl" in gone.err


def test_without_the_harness_it_says_what_to_install(
    run: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    answer = evaluate("--run-dir", run, "--task", "arc_easy")
    assert (answer.code, answer.out) == (2, "")
    assert "pip install 'phased-cpt[lm-eval]'" in answer.err


def test_folders_that_are_not_there_or_not_wanted_are_told(run: Path, evaluate: Evaluate) -> None:
    answer = evaluate("--run-dir", run, "--include-path", "nix")
    assert answer.code == 2 and "name those that are wanted with --task" in answer.err
    pytest.importorskip("lm_eval")
    answer = evaluate("--run-dir", run, "--task", "a", "--include-path", "nix")
    assert answer.code == 2 and "--include-path nix: no such folder" in answer.err


def test_figures_are_numbers_by_the_names_of_the_harness() -> None:
    theirs = {
        "alias": "mine", "sample_len": 8, "acc,none": 0.5, "acc_stderr,none": float("nan"), "exact_match,strict": 1,
        "exact_match_stderr,strict": "N/A",
    }  # fmt: skip
    assert tasks._figures(theirs) == {"acc": 0.5, "exact_match,strict": 1.0}
