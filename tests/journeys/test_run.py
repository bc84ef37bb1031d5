"""What a run writes, which part of it is wanted, and what is refused before anything is trained."""

import json
import math
from pathlib import Path

import pytest

from phased_cpt.conductor import smoke_run_dir
from phased_cpt.data.blocks import IGNORED
from phased_cpt.data.index import open_blocks
from phased_cpt.data.mixing import training_order
from phased_cpt.errors import InputError, LedgerRefuses, PhasedCptError
from phased_cpt.job import Job
from phased_cpt.ledger import read_record
from phased_cpt.run_dir import RunDir
from tests.conftest import SAMPLE
from tests.journeys.conftest import Ran, Tiny, lines, planned
from tests.tracking.test_tensorboard import drawn
from tests.tracking.test_wandb import history, offline

TRAINED = {
    "ts", "phase", "step", "loss", "grad_norm", "learning_rate", "epoch", "progress_pct", "eta_seconds",
    "curriculum_eta_seconds", "tokens_seen", "tokens_per_second", "memory_bytes",
}  # fmt: skip
EVALUATED = {"ts", "phase", "step", "dataset", "eval_loss", "perplexity", "tokens"}
TWO = [
    {"name": "one", "sources": str(SAMPLE / "phase1_foundation.jsonl"), "max_steps": 3},
    {"name": "two", "sources": str(SAMPLE / "phase3_pr_mastery.jsonl"), "max_steps": 3},
]


def labels(job: Job) -> list[int]:
    """How many tokens are trained in each place of the order, counted here."""
    blocks, phase = open_blocks(Path(job.train)), job.phase_plan()
    assert phase.steps and phase.global_rows
    order = training_order(len(blocks), phase.steps * phase.global_rows, None, *phase.data_seed)
    return [int((blocks[int(block)]["labels"] != IGNORED).sum()) for block in order]


@pytest.mark.requirement("G-01", "G-02", "G-03", "E-01", "E-02", "S-03", "P-05", "C-06", "L-04")
def test_every_figure_of_a_run_is_written_once_over_phases_and_calls(tiny: Tiny, ran: Ran) -> None:
    pytest.importorskip("wandb")
    config = tiny(tracking={"wandb": {"enabled": True, "mode": "offline"}}, phases=TWO)
    assert ran(config, last="one").trained == ("one",)
    resolved = Path("run/config_resolved.yaml").read_bytes()
    assert ran(config).trained == ("two",), "the first is not trained again"
    assert ran(config).trained == (), "and now there is nothing to do"

    root = Path("run")
    for phase, folder in (("one", root / "phase1_one"), ("two", root / "phase2_two")):
        steps, every = lines(folder / "logs/train.jsonl"), lines(folder / "logs/eval.jsonl")
        evaluations = [line for line in every if line["dataset"] == phase]
        others = [(line["step"], line["dataset"]) for line in every if line["dataset"] != phase]
        assert others == ([(0, "two")] if phase == "one" else []), "the base, on what is to come"
        assert [set(line) for line in steps] == [TRAINED] * 3
        assert [set(line) for line in evaluations] == [EVALUATED] * 3
        assert [line["step"] for line in steps] == [1, 2, 3]
        assert [line["step"] for line in evaluations] == [0, 2, 3]
        counted = labels(Job.read(folder / "job.json"))
        assert [line["tokens_seen"] for line in steps] == [sum(counted[: 8 * step]) for step in (1, 2, 3)]
        assert [line["progress_pct"] for line in steps] == [33.33, 66.67, 100.0]
        assert steps[-1]["eta_seconds"] == 0
        assert (steps[-1]["curriculum_eta_seconds"] > 0) == (phase == "one"), "there is another phase to come"
        final = json.loads((folder / "eval_final.json").read_text())
        best = min(evaluations[1:], key=lambda line: line["eval_loss"])
        assert (final["step"], final["eval_loss"]) == (best["step"], best["eval_loss"])
        assert final["perplexity"] == pytest.approx(math.exp(final["eval_loss"]))

    assert [step for step, _ in drawn(root, "train/loss")] == [1, 2, 3, 4, 5, 6], "one axis for the curriculum"
    folders = offline(root)
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1, "one run there, over phases and calls"
    seen = [row["curriculum_step"] for folder in folders for row in history(folder) if "train/loss" in row]
    assert seen == [1, 2, 3, 4, 5, 6]
    told = (root / "logs/training.log").read_text()
    assert "phase 2/2 two: step 3/3" in told
    assert "one: trainable parameters: 8,192 of 606,528, 1.35%" in told
    assert "one: loss: chunked" in told and "attention sdpa" in told
    assert Path("run/config_resolved.yaml").read_bytes() == resolved
    assert len({path.parent for path in Path().rglob("run.json")}) == 1, "one run folder for all ranks"


@pytest.mark.requirement("S-04")
def test_a_part_of_a_run(tiny: Tiny, ran: Ran) -> None:
    config = tiny(data={"eval_share": 0}, phases=TWO)
    with pytest.raises(InputError, match="--from two: phase one before it is not done yet"):
        ran(config, first="two")
    assert ran(config, first="one", last="one").trained == ("one",)
    with pytest.raises(LedgerRefuses, match=r"learning_rate: was 0\.001, is 0\.002"):
        ran(tiny(data={"eval_share": 0}, phases=TWO, training={"learning_rate": 2e-3}))
    assert ran(config, first="two", last="two").trained == ("two",)
    before = Path("run/phase1_one/best_adapter/adapter_model.safetensors").stat().st_mtime_ns
    assert ran(config, redo_from="two").trained == ("two",)
    assert Path("run/archive/1/phase2_two/best_adapter").is_dir(), "what is redone is kept"
    assert Path("run/phase1_one/best_adapter/adapter_model.safetensors").stat().st_mtime_ns == before
    more = [*TWO, {"name": "more", "sources": TWO[0]["sources"], "max_steps": 2}]
    assert ran(tiny(data={"eval_share": 0}, phases=more)).trained == ("more",), "a new phase at the end is welcome"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"first": "evolutoin"}, "--from: no phase is called 'evolutoin'; did you mean evolution?"),
        ({"last": "nothing"}, "--until: no phase is called 'nothing'"),
        ({"first": "pr_mastery", "last": "foundation"}, "--from pr_mastery comes after --until foundation"),
        ({"redo_from": "foundation"}, "--redo-from: no run has begun yet"),
    ],
)
def test_what_cannot_be_wanted_is_refused_and_nothing_is_written(
    wanted: dict[str, str], message: str, tiny: Tiny, ran: Ran
) -> None:
    config = tiny()
    with pytest.raises(InputError) as refused:
        ran(config, **wanted)
    assert message in str(refused.value)
    assert not Path("run").exists()


@pytest.mark.requirement("S-02")
def test_each_phase_may_have_its_own_zero_stage_and_values(tiny: Tiny, ran: Ran) -> None:
    phases = [TWO[0] | {"training": {"deepspeed": "zero3.json"}}, TWO[1] | {"training": {"learning_rate": 5e-4}}]
    outcome = ran(tiny(phases=phases))
    stages = [Job.read(outcome.run_dir.root / f"{p.folder}/job.json").deepspeed for p in outcome.plan.phases]
    assert [stage["zero_optimization"]["stage"] for stage in stages] == [3, 2]
    peaks = [
        lines(outcome.run_dir.root / f"{p.folder}/logs/train.jsonl")[1]["learning_rate"] for p in outcome.plan.phases
    ]
    assert peaks == [1e-3, 5e-4]
    record = read_record(outcome.run_dir)
    assert record and record.phases[0].execution["deepspeed"] != record.phases[1].execution["deepspeed"]


def test_a_smoke_run_takes_two_steps_of_every_phase(tiny: Tiny, ran: Ran) -> None:
    """With a configuration whose own budget and warm-up would be far too long."""
    phases = [phase | {"max_steps": 10**6} for phase in TWO]
    config = tiny(phases=phases, training={"warmup_steps": 1000})
    config["run"]["dir"] = str(smoke_run_dir(planned(config)).root)
    outcome = ran(config, smoke=True)
    assert outcome.finished
    for phase in outcome.plan.phases:
        folder = outcome.run_dir.root / phase.folder
        assert [line["step"] for line in lines(folder / "logs/train.jsonl")] == [1, 2]
        evaluations = [line for line in lines(folder / "logs/eval.jsonl") if line["dataset"] == phase.name]
        assert [line["step"] for line in evaluations] == [0, 1, 2]
        assert (folder / "best_adapter/source.json").exists()
    assert outcome.run_dir.root == Path("outputs/tiny-smoke"), "beside the runs"
    assert smoke_run_dir(planned(config)) == RunDir(Path("outputs/tiny-smoke"))
    assert not Path("outputs/tiny-smoke").exists(), "each begins in an empty folder"


@pytest.mark.requirement("T-05")
def test_another_optimizer_is_taken_by_its_name_and_one_that_is_none_is_told(tiny: Tiny, ran: Ran) -> None:
    config = tiny(data={"eval_share": 0}, phases=TWO[:1], training={"optimizer": "adamw_torch"})
    assert ran(config).finished
    first = Path("run/phase1_one/best_adapter/adapter_model.safetensors").read_bytes()
    config = tiny(data={"eval_share": 0}, phases=TWO[:1], training={"optimizer": "paged_adamw_8bit"})
    config["run"]["dir"] = "other"
    assert ran(config).finished
    assert Path("other/phase1_one/best_adapter/adapter_model.safetensors").read_bytes() != first
    config = tiny(data={"eval_share": 0}, phases=TWO[:1], training={"optimizer": "adamw_troch"})
    config["run"]["dir"] = "none"
    with pytest.raises(PhasedCptError, match=r"training\.optimizer: the Trainer knows no 'adamw_troch'; did you mean"):
        ran(config)


def test_the_processes_that_are_there_count_and_not_those_that_are_written(tiny: Tiny, ran: Ran) -> None:
    """As when a file says four GPUs, and `deepspeed --num_gpus=2` is typed: twice the same is the same."""
    config = tiny(data={"eval_share": 0}, launch={"num_gpus": 4}, phases=TWO[:1])
    config["training"] |= {"gradient_accumulation_steps": 2, "global_batch_size": None}
    assert ran(config, ranks=2).finished
    assert ran(config, ranks=2).trained == ()
    with pytest.raises(LedgerRefuses, match="global_batch_size: was 8, is 4"):
        ran(config, ranks=1)
