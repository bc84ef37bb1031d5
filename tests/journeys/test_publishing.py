"""What a phase publishes: the weights of the step it names, whole or not at all, and found again wherever they lie."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file

from phased_cpt.data.tokenizer import load_tokenizer
from phased_cpt.errors import LedgerRefuses, PhasedCptError
from phased_cpt.ledger import Ledger
from tests.conftest import TOKENIZER
from tests.journeys.conftest import Ran, Tiny, lines
from tests.journeys.test_handover import Instead, differ, flip, phases, published
from tests.zygote import ForkedJobs, Zygote

HERE = "tests.journeys.test_publishing"


class MustNotTrain:
    """A door that stays shut."""

    ranks = 2

    def train(self, job: object, stop: object) -> None:
        raise AssertionError("nothing was to be trained")


def door(zygote: Zygote, program: str) -> Any:
    """Ranks that run a program of this page in place of the worker."""
    return ForkedJobs(Instead(zygote, f"{HERE}:{program}"))  # type: ignore[arg-type]


def source(folder: str) -> dict[str, Any]:
    [path] = Path("run", folder).glob("best_*/source.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# The best, or the last -------------------------------------------------------------------------------------------------


def kept(arguments: list[str]) -> None:
    """In the ranks: the worker, who keeps the masters of every step that is evaluated."""
    from safetensors.torch import save_file

    from phased_cpt import worker
    from phased_cpt.train.publish import saved_names
    from tests.train.programs import gathered

    evaluate = worker.PhaseRun._evaluate

    def keeping(run: worker.PhaseRun) -> Any:
        masters = gathered(run.model, keep=True)
        names = saved_names(run.model, list(masters))
        if run.rank.first:
            step = run.trainer.state.global_step
            save_file({names[name]: each for name, each in masters.items()}, run.folder / f"step{step}.st")
        return evaluate(run)

    worker.PhaseRun._evaluate = keeping  # type: ignore[method-assign]
    worker.main(arguments)


def reopened(run: str, moved: str, evaluated: str, texts: list[str]) -> dict[str, Any]:
    """In a process of its own: what is published, by PEFT and transformers alone, and by the one call of ours."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from phased_cpt.data.index import open_blocks
    from phased_cpt.evals.rows import Rows
    from phased_cpt.model.reload import load_published

    rows = Rows(open_blocks(Path(evaluated)))

    def loss(model: Any) -> float:
        total, count = 0.0, 0
        for at in range(len(rows)):
            row = {name: values[None] for name, values in rows[at].items()}
            labels = row.pop("labels")[0, 1:]
            with torch.no_grad():
                logits = model(**row, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
        return total / count

    folder = f"{run}/phase1_foundation/best_adapter"
    base = AutoModelForCausalLM.from_pretrained(f"{run}/random_base")
    found: dict[str, Any] = {"base": loss(base), "plain": loss(PeftModel.from_pretrained(base, folder).eval())}
    found["ids"] = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    Path(run).rename(moved)
    model, tokenizer = load_published(moved)
    found |= {"ours": loss(model), "again": loss(load_published(moved, "foundation")[0]), "ours_ids": tokenizer(texts)["input_ids"]}  # fmt: skip
    try:
        load_published(moved, "evolution")
    except Exception as error:
        found["refused"] = str(error)
    return found


RISING = {
    "training": {"learning_rate": 0.5, "lr_scheduler": "constant", "max_grad_norm": None},
    "evaluation": {"every_steps": 1},
}


@pytest.mark.requirement("E-02", "E-03", "L-05")
def test_the_best_step_is_published_and_loses_what_is_said(
    tiny: Tiny, ran: Ran, zygote: Zygote, tmp_path: Path
) -> None:
    outcome = ran(tiny(**RISING, phases=phases(tiny, {}, {}, steps=3)), door=door(zygote, "kept"), last="foundation")
    folder = Path("run/phase1_foundation")
    losses = {line["step"]: line["eval_loss"] for line in lines(folder / "logs/eval.jsonl") if line["step"]}
    best = min(losses, key=losses.__getitem__)
    assert best < 3, "the loss rises at the end, or nothing is shown here"
    said = source("phase1_foundation")
    assert (said["step"], said["steps"], said["why"]) == (best, 3, "lowest held-out loss")
    assert differ(published(outcome, 1), load_file(folder / f"step{best}.st")) == 0
    assert differ(published(outcome, 1), load_file(folder / "step3.st")) == 28, "the last ones are others"
    final = json.loads((folder / "eval_final.json").read_text())
    assert (final["step"], final["eval_loss"]) == (best, losses[best])

    # Plain PEFT finds the same in it, and so does load_published, even after the folder has moved.
    texts = ["def f(x):\n    return x", "naïve  <|endoftext|> 日本"]
    evaluated = json.loads((folder / "job.json").read_text())["evaluated"]["foundation"]
    found = zygote.call(f"{HERE}:reopened", "run", "moved", evaluated, texts, folder=tmp_path / "reopened")
    for how in ("plain", "ours", "again"):
        assert found[how] == pytest.approx(final["eval_loss"], abs=1e-5)
    assert found["base"] == pytest.approx(final["start"]["eval_loss"], abs=1e-5)
    assert abs(found["base"] - found["plain"]) > 1e-3, "the base alone loses something else"
    tokenizer = load_tokenizer(str(TOKENIZER), None, None, tmp_path)
    assert found["ids"] == found["ours_ids"] == [tokenizer.reference.encode(text).ids for text in texts]
    assert "evolution has published nothing; foundation has" in found["refused"]


def test_the_last_step_is_published_where_that_is_wanted(tiny: Tiny, ran: Ran, zygote: Zygote) -> None:
    sections = RISING | {"evaluation": {"every_steps": 1, "publish": "last"}}
    outcome = ran(tiny(**sections, phases=phases(tiny, {}, steps=3)), door=door(zygote, "kept"))
    said = source("phase1_foundation")
    assert (said["step"], said["why"]) == (3, "the last step, as evaluation.publish says")
    assert differ(published(outcome, 1), load_file("run/phase1_foundation/step3.st")) == 0


def test_patience_stops_a_phase_and_publishes_its_best(tiny: Tiny, ran: Ran) -> None:
    sections = RISING | {"evaluation": {"every_steps": 1, "patience": 2, "cooldown_ratio": 0}}
    outcome = ran(tiny(**sections, phases=phases(tiny, {}, steps=40)))
    said = source("phase1_foundation")
    assert outcome.finished
    assert said["steps"] == said["step"] + 2 < 40
    assert said["why"] == "lowest held-out loss"
    assert len(lines(Path("run/phase1_foundation/logs/train.jsonl"))) == said["steps"]


def umasked(arguments: list[str]) -> None:
    """In the ranks: the worker of somebody who shares with a group."""
    from phased_cpt import worker

    os.umask(0o027)
    worker.main(arguments)


@pytest.mark.requirement("R-04")
def test_the_shortest_phases_publish(tiny: Tiny, ran: Ran, zygote: Zygote) -> None:
    """One step, with which no A of a fresh adapter can have moved; then one without anything to measure it by."""
    short = {"max_steps": 1, "training": {"warmup_steps": 0, "weight_decay": 0}, "evaluation": {"every_steps": 50}}
    unmeasured = {"max_steps": 1, "training": {"warmup_steps": 0}, "data": {"eval_share": 0}}
    mask = os.umask(0o027)
    try:
        ran(tiny(phases=phases(tiny, short, unmeasured)), door=door(zygote, "umasked"))
    finally:
        os.umask(mask)
    assert source("phase1_foundation")["why"] == "lowest held-out loss"
    assert Path("run/phase1_foundation/eval_final.json").exists()
    assert source("phase2_evolution")["why"] == "the last step; nothing is held out"
    assert not Path("run/phase2_evolution/eval_final.json").exists()
    files = [path for path in Path("run").glob("phase*/best_adapter/*") if path.is_file()]
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "source.json", "tokenizer.json"} <= {path.name for path in files}  # fmt: skip
    wrong = {
        path.name: oct(path.stat().st_mode) for path in files if stat.S_IMODE(path.stat().st_mode) & 0o777 != 0o640
    }
    assert not wrong
    assert not list(Path("run").glob("phase*/checkpoints"))


# Whole, or not at all --------------------------------------------------------------------------------------------------

BROKEN = {
    "missing": "b is missing",
    "another": "c was not expected",
    "reshaped": "b is [4, 2], not [2, 4]",
    "empty": "b is [0], not [2, 4]",
    "nan": "b is not finite",
    "infinite": "b is not finite",
    "unchanged": "b has not changed",
    "one A at rest": "x.lora_A.w has not changed",
}


def refusals(folder: str) -> dict[str, str]:
    """In a rank: what require_sound says of a file with one broken tensor."""
    import torch
    from safetensors.torch import save_file

    from phased_cpt.train.masters import bit_sum
    from phased_cpt.train.publish import require_sound

    first = {"a": torch.ones(3), "b": torch.ones(2, 4), "x.lora_A.w": torch.ones(2), "y.lora_A.w": torch.ones(2)}
    trained = {name: tensor + 0.5 for name, tensor in first.items()}
    written = {
        "sound": trained,
        "all A at rest": trained | {name: each for name, each in first.items() if "lora_A" in name},
        "experts at rest": trained,
        "missing": {name: each for name, each in trained.items() if name != "b"},
        "another": trained | {"c": torch.ones(1)},
        "reshaped": trained | {"b": torch.ones(4, 2)},
        "empty": trained | {"b": torch.ones(0)},
        "nan": trained | {"b": torch.full((2, 4), float("nan"))},
        "infinite": trained | {"b": torch.tensor([[float("inf")] * 4] * 2)},
        "unchanged": trained | {"b": first["b"]},
        "one A at rest": trained | {"x.lora_A.w": first["x.lora_A.w"]},
    }
    found = {}
    for kind, tensors in written.items():
        place = Path(folder) / kind
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        try:
            require_sound(
                place, {name: tuple(each.shape) for name, each in first.items()}, {name: bit_sum(each) for name, each in first.items()}
            )  # fmt: skip
        except PhasedCptError as error:
            found[kind] = str(error)
    large = torch.randn(9_000_001)
    moved = large.clone()
    moved[-1] += 1
    found["sums"] = [bit_sum(large) == bit_sum(large.clone()), bit_sum(large) == bit_sum(moved)]
    return found


def test_every_broken_tensor_is_refused_by_name(zygote: Zygote, tmp_path: Path) -> None:
    found = zygote.call(f"{HERE}:refusals", str(tmp_path / "written"), folder=tmp_path / "rank")
    assert found.pop("sums") == [True, False]
    assert found == {kind: f"{tmp_path}/written/{kind}: not published: {said}" for kind, said in BROKEN.items()}
    # And the negative controls, "sound" and what may rest, are in none of them.


def spoiled(arguments: list[str]) -> None:
    """In the ranks: the worker, whose disk gives a NaN back."""
    from safetensors.torch import load_file, save_file

    from phased_cpt import worker
    from phased_cpt.train import publication

    sound = publication.require_sound

    def spoiling(folder: Path, *others: Any) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        first = next(iter(weights))
        save_file(weights | {first: weights[first] * float("nan")}, folder / "adapter_model.safetensors")
        sound(folder, *others)

    publication.require_sound = spoiling
    worker.main(arguments)


def killed(arguments: list[str]) -> None:
    """In the ranks: the worker, and the second one is killed after three steps of the second phase."""
    import signal

    from phased_cpt import worker

    check = worker.PhaseRun._check

    def dying(run: worker.PhaseRun, step: int) -> None:
        check(run, step)
        if run.phase.number == 2 and step == 3 and run.rank.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    worker.PhaseRun._check = dying  # type: ignore[method-assign]
    worker.main(arguments)


@pytest.mark.requirement("S-03")
def test_a_phase_that_is_broken_or_killed_publishes_nothing_and_is_trained_again(
    tiny: Tiny, ran: Ran, zygote: Zygote
) -> None:
    config = tiny(phases=phases(tiny, {}, {}, steps=4))
    with pytest.raises(PhasedCptError, match=r"not published: .*lora_A.weight is not finite"):
        ran(config, door=door(zygote, "spoiled"))
    assert not list(Path("run").glob("*/best_*"))
    with pytest.raises(PhasedCptError):  # of the killed rank, or of the one that missed it
        ran(config, door=door(zygote, "killed"))
    assert [path.parent.name for path in Path("run").glob("*/best_*")] == ["phase1_foundation"]
    assert ran(config).trained == ("evolution",)
    for phase in ("phase1_foundation", "phase2_evolution"):
        assert [line["step"] for line in lines(Path("run", phase, "logs/train.jsonl"))] == [1, 2, 3, 4]
    assert ran(config, door=MustNotTrain()).trained == ()


def test_what_was_published_just_before_the_end_is_adopted(
    tiny: Tiny, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Between the weights and the ledger's line."""

    def dies(*arguments: object) -> None:
        raise Killed

    config = tiny(data={"eval_share": 0}, phases=phases(tiny, {}))
    weights = Path("run/phase1_foundation/best_adapter/adapter_model.safetensors")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Ledger, "publish", dies)
        ran(config)
    # Not with other values, not with another byte, and not as the weights of another phase …
    with pytest.raises(LedgerRefuses, match="learning_rate"):
        ran({**config, "training": {**config["training"], "learning_rate": 1e-4}}, door=MustNotTrain())
    flip(weights)
    with pytest.raises(PhasedCptError, match=r"not what was published; restore it, or .*--redo-from foundation"):
        ran(config, door=MustNotTrain())
    flip(weights)
    marker = weights.with_name("source.json")
    said = marker.read_text()
    marker.write_text(json.dumps(json.loads(said) | {"fingerprint": "0" * 64}))
    with pytest.raises(AssertionError, match="nothing was to be trained"):
        ran(config, door=MustNotTrain())
    marker.write_text(said)
    # … but as what they are, without training again.
    assert ran(config, door=MustNotTrain()).finished


# Found again -----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_another_place_and_by_nothing_that_adapter_config_says_of_places(
    tiny: Tiny, ran: Ran
) -> None:
    config = tiny(data={"eval_share": 0}, phases=phases(tiny, {}, {"lora": {"dropout": 0.4}}))
    outcome = ran(config, last="foundation")
    first = published(outcome, 1)
    shutil.move("run", "moved")
    path = Path("moved/phase1_foundation/best_adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/nowhere"}))
    config["run"]["dir"] = "moved"
    outcome = ran(config)
    assert outcome.trained == ("evolution",)
    assert differ(published(outcome, 1), first) == 0
    assert 0 < max(numpy.abs(each - first[name]).max() for name, each in published(outcome, 2).items()) < 0.01
    written = json.loads(Path("moved/phase2_evolution/best_adapter/adapter_config.json").read_text())
    assert (json.loads(path.read_text())["lora_dropout"], written["lora_dropout"]) == (0.05, 0.4), "the dropout holds"


def test_a_byte_that_has_changed_is_noticed_before_the_next_phase_starts(tiny: Tiny, ran: Ran) -> None:
    config = tiny(data={"eval_share": 0}, phases=phases(tiny, {}, {}))
    ran(config, last="foundation")
    weights = "run/phase1_foundation/best_adapter/adapter_model.safetensors"
    flip(weights)
    with pytest.raises(PhasedCptError, match="not what was published"):
        ran(config, door=MustNotTrain())
    flip(weights)
    assert ran(config).trained == ("evolution",)


def test_the_final_model_is_that_of_the_last_phase_also_of_one_that_was_added_later(tiny: Tiny, ran: Ran) -> None:
    config = tiny(data={"eval_share": 0}, phases=phases(tiny, {}))
    ran(config)
    outcome = ran({**config, "phases": phases(tiny, {}, {})})
    assert outcome.trained == ("evolution",)
    final = load_file("run/final_model/adapter_model.safetensors")
    assert differ(final, published(outcome, 2)) == 0
