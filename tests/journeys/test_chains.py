"""Every chain of handovers: what was measured in training is measured again, and merged it is the sum of its parts."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from phased_cpt import merging
from phased_cpt.merging import MergeJob
from tests.conftest import SAMPLE, Call
from tests.journeys.conftest import PHASES, Ran, Tiny
from tests.journeys.test_merge import HERE as MERGES
from tests.zygote import Zygote

HERE = "tests.journeys.test_chains"
EXACT = 1e-5
WHOLE = {"lora": {"enabled": False}, "training": {"learning_rate": 1e-3}}

# How each phase hands over, what phases have of their own, and whose adapters are in the last one.
FOUNDATION, EVOLUTION, PR_MASTERY = PHASES.values()
CHAINS: dict[str, tuple[list[str], dict[int, Any], list[str]]] = {
    "continue": (["continue", "continue"], {}, [PR_MASTERY]),
    "merge, merge": (["merge", "merge"], {}, [FOUNDATION, EVOLUTION, PR_MASTERY]),
    "stack, continue": (["stack", "continue"], {}, [FOUNDATION, PR_MASTERY]),
    "merge, stack": (["merge", "stack"], {}, [FOUNDATION, EVOLUTION, PR_MASTERY]),
    "merge, every weight": (["merge", "continue"], {1: WHOLE}, [PR_MASTERY]),
}
BF16 = {"model": {"precision": "bf16"}}
QLORA = {"model": {"precision": "bf16", "use_4bit": True}}


# In the zygote ----------------------------------------------------------------------------------------------------------


def measured(run: str) -> dict[str, Any]:
    """`phased-cpt evaluate`; a merge that it needs is made here, and not in a process of its own."""
    from phased_cpt import merging
    from phased_cpt.evaluate import evaluated
    from phased_cpt.wanted import EvaluateWanted, ModelsWanted
    from tests.journeys.test_merge import merges

    merging._run = lambda job: merges(json.dumps(asdict(job)))
    models = evaluated(EvaluateWanted(ModelsWanted(Path(run), device="cpu")))["models"]
    return {name: facts["held_out"] for name, facts in models.items()}


def summed(run: str, merged: str, adapters: list[str], whole: str | None) -> dict[str, float]:
    """How far a merged model is from base (or whole weights) + s·B·A of every adapter, worked out here."""
    from safetensors.torch import load_file

    def files(folder: Path) -> dict[str, Any]:
        return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}

    root, found, off = Path(run), files(Path(merged)), {"all": 0.0, "without the first": 0.0, "base": 0.0}
    base = files(root / (f"{whole}/best_model" if whole else "random_base"))
    parts = []
    for phase in adapters:
        config = json.loads((root / phase / "best_adapter/adapter_config.json").read_bytes())
        parts.append((config["lora_alpha"] / config["r"], files(root / phase / "best_adapter")))
    assert found.keys() == base.keys()
    types = {str(each.dtype) for each in found.values()}
    for name, tensor in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        deltas = [s * saved[f"{stem}B.weight"].double() @ saved[f"{stem}A.weight"].double() for s, saved in parts if f"{stem}A.weight" in saved]  # fmt: skip
        for what, some in (("all", deltas), ("without the first", deltas[1:]), ("base", [])):
            apart = (found[name].double() - tensor.double() - sum(some)).norm() / tensor.double().norm()
            off[what] = max(off[what], float(apart))
    return off | {"types": sorted(types)}  # type: ignore[dict-item]


def loaded(run: str) -> dict[str, Any]:
    """What one call brings back of the last phase, and of plain transformers and PEFT: the logits, and who is active."""
    import torch
    from transformers import AutoModelForCausalLM

    from phased_cpt.model.reload import load_published

    torch.set_num_threads(1)
    ids = torch.arange(96)[None] * 37 % 4096
    model, _ = load_published(run)
    published = json.loads((Path(run) / "run.json").read_bytes())["phases"][-1]["published"]

    @torch.no_grad()
    def logits(each: Any) -> Any:
        return each.eval()(ids, use_cache=False).logits.float()

    merged = logits(AutoModelForCausalLM.from_pretrained(f"{run}/merged_model", dtype=torch.float32))
    largest, wanted = float(merged.abs().max()), logits(model)
    with model.disable_adapter():  # type: ignore[operator, attr-defined]
        below = logits(model)
    return {
        "off": float((wanted - merged).abs().max()) / largest,
        "adapters off": float((below - merged).abs().max()) / largest,
        "active": len(model.base_model.active_adapters) == len(published["adapters"]),  # type: ignore[union-attr]
    }


def kept_half(run: str, out: str) -> dict[str, Any]:
    """`sweep-lambda` at a half, and so near to all of it that it is worked out, not published; and a half, written."""
    import torch
    from safetensors.torch import load_file

    from phased_cpt import merging
    from phased_cpt.blend import merge_part
    from phased_cpt.cli.options import the_plan
    from phased_cpt.evaluate.sweep import swept
    from phased_cpt.run_dir import RunDir
    from phased_cpt.wanted import ModelsWanted, SweepWanted
    from tests.evaluate.test_sweep import _of_folder
    from tests.journeys.test_merge import merges

    merging._run = lambda job: merges(json.dumps(asdict(job)))
    facts = swept(SweepWanted(ModelsWanted(Path(run), device="cpu"), strengths=(0.5, 1 - 1e-9)))
    merge_part(the_plan(None, None, Path(run)), RunDir(Path(run)), None, 0.5, Path(out), print)
    half, all_ = load_file(f"{out}/model.safetensors"), load_file(f"{run}/merged_model/model.safetensors")
    base = load_file(f"{run}/random_base/model.safetensors")
    off = {0.25: 0.0, 0.5: 0.0}
    for strength, name in ((strength, name) for strength in off for name in base):
        there = torch.lerp(base[name].double(), all_[name].double(), strength)
        off[strength] = max(off[strength], float((half[name].double() - there).norm() / there.norm()))
    lines = [line["losses"] for line in facts["strengths"]]
    return {"losses": lines, "half": _of_folder(Path(run), Path(out)), "off": off[0.5], "off a quarter": off[0.25]}


def swept_as_trained(run: str) -> list[dict[str, Any]]:
    from phased_cpt.evaluate.sweep import swept
    from phased_cpt.wanted import ModelsWanted, SweepWanted

    facts = swept(SweepWanted(ModelsWanted(Path(run), device="cpu"), strengths=(0.5,)))
    return [line["losses"] for line in facts["strengths"]]


# Here -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def merged_quickly(zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[MergeJob]:
    """Merges without the imports of a process of their own; which they were."""
    seen: list[MergeJob] = []

    def run(job: MergeJob) -> None:
        seen.append(job)
        zygote.call(f"{MERGES}:merges", json.dumps(asdict(job)), folder=tmp_path / "child")

    (tmp_path / "child").mkdir()
    monkeypatch.setattr(merging, "_run", run)
    return seen


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chains")


Chained = Callable[..., Path]


@pytest.fixture
def chained(tiny: Tiny, ran: Ran, kept: Path, merged_quickly: list[MergeJob]) -> Iterator[Chained]:
    """A run of three phases that hand over so, merged at its end; trained once for all tests of it."""

    def once(chain: str, **sections: Any) -> Path:
        handovers, own, _ = CHAINS[chain]
        folder = kept / "".join(letter for letter in f"{chain}{sections}" if letter.isalnum())
        training = {"learning_rate": 0.02, "micro_batch_size": 4}
        config = tiny(training=training, merge={"enabled": True}, **sections)
        config["evaluation"]["general"] = {"unseen": str(SAMPLE / "phase3_pr_mastery.jsonl")}
        for at, phase in enumerate(config["phases"]):
            phase |= {"max_steps": 2, "handover": [*handovers, "continue"][at]} | own.get(at, {})
        if not folder.exists():
            assert ran(config).finished
            shutil.copytree("run", folder)
        shutil.copytree(folder, "run", dirs_exist_ok=True)
        merged_quickly.clear()
        return Path("run").resolve()

    yield once


def rows(run: Path) -> dict[str, Any]:
    """What the jobs themselves have measured of each phase, as they published it."""
    sources = {phase: json.loads(next((run / folder).glob("best_*/source.json")).read_text()) for phase, folder in PHASES.items()}  # fmt: skip
    return {"base": sources["foundation"]["row_before"]} | {phase: each["row"] for phase, each in sources.items()}


@pytest.mark.requirement("E-04", "S-02")
@pytest.mark.parametrize("chain", CHAINS)
def test_evaluate_measures_of_every_phase_what_training_has_measured(
    chain: str, chained: Chained, zygote: Zygote, tmp_path: Path
) -> None:
    run = chained(chain)
    before = {path: path.read_bytes() for path in run.glob("*/best_*/*") if path.is_file()}
    found = zygote.call(f"{HERE}:measured", str(run), folder=tmp_path)
    wanted = rows(run)
    assert list(found) == [*wanted, "merged"] and list(found["base"]) == [*PHASES, "unseen"]
    for name, row in wanted.items():
        for of, facts in row.items():
            assert found[name][of]["tokens"] == facts["tokens"]
            assert found[name][of]["eval_loss"] == pytest.approx(facts["eval_loss"], rel=1e-6), (name, of)
    losses = [facts[of]["eval_loss"] for facts in wanted.values() for of in PHASES]
    assert all(abs(one - other) > 1e-4 for at, one in enumerate(losses) for other in losses[:at]), "the control"
    assert found["merged"]["unseen"]["eval_loss"] == pytest.approx(found["pr_mastery"]["unseen"]["eval_loss"], rel=1e-5)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.requirement("E-04")
def test_a_base_between_two_phases_that_is_gone_is_merged_again_and_that_is_said(
    chained: Chained, zygote: Zygote, tmp_path: Path
) -> None:
    run = chained("merge, merge")
    assert [path.parent.name for path in run.glob("*/merged_base")] == [EVOLUTION], "only the newest is kept"
    shutil.rmtree(run / EVOLUTION / "merged_base")
    found = zygote.call(f"{HERE}:measured", str(run), folder=tmp_path)
    assert found["evolution"]["foundation"]["eval_loss"] == pytest.approx(rows(run)["evolution"]["foundation"]["eval_loss"], rel=1e-6)  # fmt: skip
    said = (tmp_path / "rank0.log").read_text()
    assert f"{run / FOUNDATION / 'merged_base'} was removed" in said and "merged once more" in said
    assert sorted(path.parent.name for path in run.glob("*/merged_base")) == [FOUNDATION, EVOLUTION]
    again = zygote.call(f"{HERE}:measured", str(run), folder=tmp_path)
    assert again == found and "merged once more" not in (tmp_path / "rank0.log").read_text()


@pytest.mark.requirement("L-05")
@pytest.mark.parametrize("chain", CHAINS)
def test_one_call_loads_what_any_chain_has_published(
    chain: str, chained: Chained, zygote: Zygote, tmp_path: Path
) -> None:
    found = zygote.call(f"{HERE}:loaded", str(chained(chain)), folder=tmp_path)
    assert found["off"] <= EXACT < found["adapters off"] and found["active"]


@pytest.mark.requirement("M-01", "S-02")
@pytest.mark.parametrize("chain", CHAINS)
def test_the_merged_model_of_every_chain_is_the_sum_of_its_parts(
    chain: str, chained: Chained, zygote: Zygote, tmp_path: Path
) -> None:
    run, adapters = chained(chain), CHAINS[chain][2]
    whole = EVOLUTION if 1 in CHAINS[chain][1] else None
    off = zygote.call(f"{HERE}:summed", str(run), str(run / "merged_model"), adapters, whole, folder=tmp_path)
    assert off["all"] <= 1e-6 and off["types"] == ["torch.float32"]
    assert off["without the first"] > 1e-3, "the control: every one of them counts"


@pytest.mark.requirement("M-03")
def test_any_phase_of_a_chain_is_merged_by_the_verb_on_a_base_that_is_made_again(
    chained: Chained, merged_quickly: list[MergeJob], call: Call, zygote: Zygote, tmp_path: Path
) -> None:
    run = chained("merge, stack")
    shutil.rmtree(run / FOUNDATION / "merged_base")
    answer = call("merge", "--run-dir", "run", "--phase", "evolution", "--out", "early")
    assert answer.code == 0 and "merged once more" in answer.err, answer.err
    assert [Path(job.output).name for job in merged_quickly] == ["merged_base", "early"]
    early = str(tmp_path / "early")
    assert zygote.call(f"{HERE}:summed", str(run), early, [FOUNDATION, EVOLUTION], None, folder=tmp_path)["all"] <= 1e-6
    assert zygote.call(f"{HERE}:summed", str(run), early, [FOUNDATION, EVOLUTION, PR_MASTERY], None, folder=tmp_path)["all"] > 1e-3  # fmt: skip


@pytest.mark.requirement("M-01", "T-07")
@pytest.mark.parametrize("sections", [BF16, QLORA], ids=["bf16", "QLoRA"])
def test_a_chain_stays_in_16_bits_and_is_rounded_once_a_merge(
    sections: dict[str, Any], chained: Chained, zygote: Zygote, tmp_path: Path
) -> None:
    """After QLoRA, too: what 4 bits had taken from the base (9 % of each weight's norm) is not in what is handed over."""
    run = chained("merge, merge", **sections)
    base = str(run / EVOLUTION / "merged_base")
    off = zygote.call(f"{HERE}:summed", str(run), base, [FOUNDATION, EVOLUTION], None, folder=tmp_path)
    assert off["types"] == ["torch.bfloat16"] and off["all"] < 2 * 2**-8
    assert off["without the first"] > 4 * off["all"], "the control"
    assert "quantization_config" not in json.loads(Path(base, "config.json").read_text())
    facts = json.loads((run / "merged_model/merge.json").read_text())
    assert facts["logits"]["agreed"] >= 0.999 * facts["logits"]["clear"] and facts["merged"] == 14
    found, wanted = zygote.call(f"{HERE}:measured", str(run), folder=tmp_path), rows(run)
    for name, row in wanted.items():
        for of, each in row.items():
            assert found[name][of]["eval_loss"] == pytest.approx(each["eval_loss"], rel=1e-3), (name, of)


@pytest.mark.requirement("E-04", "M-03")
@pytest.mark.parametrize("chain", ["stack, continue", "merge, stack", "merge, every weight"])
def test_a_part_of_any_chain_is_that_part_of_its_whole_change(
    chain: str, chained: Chained, zygote: Zygote, tmp_path: Path
) -> None:
    """Were every factor halved, a quarter would be left of the adapters' products."""
    found = zygote.call(f"{HERE}:kept_half", str(chained(chain)), str(tmp_path / "half"), folder=tmp_path)
    base, half, nearly, published = found["losses"]
    assert nearly == pytest.approx(published, rel=1e-6), "the sum of its parts is what was published"
    assert half == pytest.approx(found["half"], rel=1e-6), "what is written is what was measured"
    assert found["off"] <= 1e-6 and found["off a quarter"] > 1e-3
    wanted = rows(Path("run"))
    for name in PHASES:
        assert published[name] == pytest.approx(wanted["pr_mastery"][name]["eval_loss"], rel=1e-6)
        assert base[name] == pytest.approx(wanted["base"][name]["eval_loss"], rel=1e-6)
        assert len({round(each[name], 3) for each in (base, half, published)}) == 3, "the control"


@pytest.mark.requirement("M-03")
def test_a_soup_reaches_through_merges_and_is_made_of_adapters_on_one_base(
    chained: Chained, merged_quickly: list[MergeJob], call: Call, zygote: Zygote, tmp_path: Path
) -> None:
    run = chained("merge, merge")
    assert call("soup", "--run-dir", "run", "--weight", "pr_mastery=1", "--out", "last").code == 0
    assert call("soup", "--run-dir", "run", "--weight", "foundation=0.5", "--weight", "evolution=0.5", "--out", "both").code == 0  # fmt: skip
    every = [FOUNDATION, EVOLUTION, PR_MASTERY]
    assert zygote.call(f"{HERE}:summed", str(run), str(tmp_path / "last"), every, None, folder=tmp_path)["all"] <= 1e-6
    # 0.5 of foundation, and 0.5 of foundation and evolution: all of the first, half of the second.
    assert [layer.scale for layer in merged_quickly[-1].adapters] == [1.0, 0.5]
    assert [Path(layer.folder).parent.name for layer in merged_quickly[-1].adapters] == [FOUNDATION, EVOLUTION]
    shutil.rmtree("run")
    chained("merge, every weight")
    assert call("soup", "--run-dir", "run", "--weight", "pr_mastery=0.5", "--out", "upon").code == 0
    assert merged_quickly[-1].base.endswith("phase2_evolution/best_model"), "on what was trained whole below it"
    for weights, told in (
        (
            ["foundation=1", "pr_mastery=1"],
            "foundation stands on the base and pr_mastery on phase2_evolution/best_model",
        ),
        (["evolution=1"], "it has trained every weight, and a soup is made of adapters"),
    ):
        given = [word for each in weights for word in ("--weight", each)]
        answer = call("soup", "--run-dir", "run", *given, "--out", "none")
        assert answer.code == 2 and told in answer.err and not Path("none").exists()


@pytest.mark.requirement("E-04")
def test_a_qlora_chain_is_swept_in_4_bits_and_its_ends_are_those_of_training(
    chained: Chained, zygote: Zygote, tmp_path: Path
) -> None:
    """What lies between them stands on the first base, quantised once; that is said."""
    run = chained("merge, merge", **QLORA)
    base, half, published = zygote.call(f"{HERE}:swept_as_trained", str(run), folder=tmp_path)
    for name, each in rows(run)["pr_mastery"].items():
        assert published[name] == pytest.approx(each["eval_loss"], rel=1e-3)
        assert base[name] == pytest.approx(rows(run)["base"][name]["eval_loss"], rel=1e-3)
    assert len({round(each["foundation"], 2) for each in (base, half, published)}) == 3, "the control"
    assert "earlier phases were merged and rounded on the way" in (tmp_path / "rank0.log").read_text()
