"""Every phase's held-out documents before the first phase and after each: what is published, and not what came last."""

import json
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.forgetting import Row, measures
from tests.conftest import SAMPLE
from tests.journeys.conftest import Ran, Tiny, lines

RUN = Path("run")
PHASES = ["foundation", "evolution", "pr_mastery"]


def matrix() -> dict[str, Any]:
    return dict(json.loads((RUN / "forgetting.json").read_bytes()))


def source(folder: str) -> dict[str, Any]:
    return dict(json.loads((RUN / folder / "best_adapter" / "source.json").read_bytes()))


@pytest.mark.requirement("E-05")
def test_a_run_leaves_a_matrix_with_a_row_for_the_base_and_for_every_phase(
    tiny: Tiny, ran: Ran, tmp_path: Path
) -> None:
    general = tmp_path / "general.txt"
    general.write_text("Once upon a time there was a fox who read every book in the library. " * 40)
    config = tiny(training={"learning_rate": 0.01}, evaluation={"every_steps": 2, "general": {"tales": str(general)}})
    config["phases"][2]["data"] = {"max_tokens": 64, "overlap_tokens": 8}  # rows of another length
    ran(config)
    found = matrix()
    assert [row["after"] for row in found["rows"]] == [None, *PHASES]
    assert [(each["name"], each["kind"]) for each in found["sets"]] == [
        *((n, "phase") for n in PHASES),
        ("tales", "general"),
    ]
    for row in found["rows"]:
        assert set(row["losses"]) == {*PHASES, "tales"} and all(loss > 0 for loss in row["losses"].values())
        assert all(bits > 0 for bits in row["bits_per_byte"].values())
    rows = [Row(row["after"], row["losses"]) for row in found["rows"]]
    assert found["measures"] == measures(PHASES, ["tales"], rows)
    assert 0 < found["cost"]["share"] < 1
    # What was measured while the phases trained are the same numbers, on the same documents.
    ends = {name: source(f"phase{at}_{name}")["end"]["eval_loss"] for at, name in enumerate(PHASES, 1)}
    assert {row["after"]: row["losses"][row["after"]] for row in found["rows"][1:]} == pytest.approx(ends, rel=1e-6)
    before = {
        line["dataset"]: line["eval_loss"]
        for line in lines(RUN / "phase1_foundation/logs/eval.jsonl")
        if not line["step"]
    }
    assert before == found["rows"][0]["losses"]
    trained = {line["dataset"] for line in lines(RUN / "phase2_evolution/logs/eval.jsonl")}
    assert trained == {"evolution"}, "on its way a phase is measured on its own documents alone"
    tokens = {each["name"]: each["tokens"] for each in found["sets"]}
    assert all(tokens.values()) and len(set(tokens.values())) > 1


def test_a_row_is_of_the_weights_that_are_published(tiny: Tiny, ran: Ran) -> None:
    """A rate at which things get worse: the best is not the last, and the row is the best's."""
    config = tiny(training={"learning_rate": 0.5, "lr_scheduler": "constant"}, evaluation={"every_steps": 1})
    config["phases"] = [config["phases"][0] | {"max_steps": 3}]
    ran(config)
    published = source("phase1_foundation")
    losses = {line["step"]: line["eval_loss"] for line in lines(RUN / "phase1_foundation/logs/eval.jsonl")}
    assert published["step"] < 3 and losses[published["step"]] < losses[3] - 1e-3, "the control: others came last"
    assert published["row"]["foundation"]["eval_loss"] == pytest.approx(losses[published["step"]], rel=1e-6)


@pytest.mark.parametrize("stage", ["zero3.json", "zero2"])
def test_so_it_is_in_bf16_under_any_stage(stage: str, tiny: Tiny, ran: Ran) -> None:
    config = tiny(
        training={"learning_rate": 0.5, "lr_scheduler": "constant", "deepspeed": stage},
        evaluation={"every_steps": 1},
        model={"precision": "bf16"},
    )
    config["phases"] = [config["phases"][0] | {"max_steps": 3}]
    ran(config)
    published = source("phase1_foundation")
    losses = {line["step"]: line["eval_loss"] for line in lines(RUN / "phase1_foundation/logs/eval.jsonl")}
    assert published["step"] < 3
    assert published["row"]["foundation"]["eval_loss"] == pytest.approx(losses[published["step"]], rel=1e-6)
    assert losses[3] != pytest.approx(losses[published["step"]], rel=1e-3), "the control"


@pytest.mark.parametrize(("when", "rows"), [("end", [None, "pr_mastery"]), ("off", None)])
def test_the_matrix_may_be_made_at_the_end_alone_or_not_at_all(
    when: str, rows: list[str | None] | None, tiny: Tiny, ran: Ran
) -> None:
    ran(tiny(evaluation={"every_steps": 2, "matrix": when}))
    assert (RUN / "forgetting.json").exists() is (rows is not None)
    if rows is not None:
        assert [row["after"] for row in matrix()["rows"]] == rows
        assert matrix()["measures"]["sets"]["foundation"]["backward_transfer"] is None, "nobody has looked"


def test_the_best_may_be_that_of_old_and_new_together(tiny: Tiny, ran: Ran) -> None:
    config = tiny(training={"learning_rate": 0.02}, evaluation={"every_steps": 1})
    config["phases"] = config["phases"][:2]
    config["phases"][1]["evaluation"] = {"every_steps": 1, "best_of": {"foundation": 3.0, "evolution": 1.0}}
    ran(config)
    measured: dict[int, dict[str, float]] = {}
    for line in lines(RUN / "phase2_evolution/logs/eval.jsonl"):
        measured.setdefault(line["step"], {})[line["dataset"]] = line["eval_loss"]
    mixed = {step: (3 * each["foundation"] + each["evolution"]) / 4 for step, each in measured.items() if step}
    assert len(mixed) == 4
    assert source("phase2_evolution")["step"] == min(mixed, key=lambda step: mixed[step])


def test_samples_of_base_and_phases_continue_the_same_prompts(tiny: Tiny, ran: Ran) -> None:
    ran(tiny(training={"learning_rate": 0.02}))
    found = [json.loads(path.read_bytes()) for path in sorted(RUN.glob("phase*/samples.json"))]
    assert len(found) == 3
    assert [len(each["prompts"]) for each in found] == [3, 3, 3]
    assert found[0]["prompts"] == found[1]["prompts"] == found[2]["prompts"]
    assert found[0]["before"] and not found[1]["before"]
    assert found[0]["before"] != found[2]["after"], "the control: it has learnt something"
    text = (SAMPLE / "phase1_foundation.jsonl").read_text()
    prompt = next(each for each in found[0]["prompts"] if each["set"] == "foundation")
    assert json.dumps(prompt["text"] + prompt["continues"])[1:-1] in text, "held-out text of the set, word for word"


def test_a_control_tells_what_would_have_been_forgotten_anyway(tiny: Tiny, ran: Ran) -> None:
    """From the same start, as many steps of as many rows at the same rates, on what came before alone."""
    config = tiny(training={"learning_rate": 0.01})
    ran(config)
    assert matrix()["controls"] == {}
    published = {path: path.read_bytes() for path in sorted(RUN.glob("phase*/best_adapter/*.safetensors"))}
    assert ran(config, control=True).trained == ()
    found = matrix()
    assert list(found["controls"]) == ["evolution", "pr_mastery"]
    rows = {row["after"]: row["losses"] for row in found["rows"]}
    for name, control in found["controls"].items():
        earlier = PHASES[: PHASES.index(name)]
        assert control["forgetting"] == {each: rows[name][each] - control["losses"][each] for each in earlier}
        assert control["losses"] != rows[name], "the control of the control: it has read something else"
        ours, its = (
            lines(folder / f"phase{PHASES.index(name) + 1}_{name}/logs/train.jsonl")
            for folder in (RUN, RUN / "control")
        )
        assert [line["learning_rate"] for line in its] == [line["learning_rate"] for line in ours]
        assert its[0]["loss"] != ours[0]["loss"]
    assert {path: path.read_bytes() for path in published} == published, "the run itself is as it was"
    before = (RUN / "control/phase2_evolution/best_adapter/source.json").stat().st_mtime_ns
    ran(config, control=True)
    assert (RUN / "control/phase2_evolution/best_adapter/source.json").stat().st_mtime_ns == before, "there already"
