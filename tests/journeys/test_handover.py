"""A phase starts from what the one before has published: to the bit, whatever the engine has rounded on the way.

Each run is watched by `seen`: ranks that write down their masters before step 0, as the engine made them of what was
loaded (without `put_back`: the negative control), and as they are when training begins.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file

from phased_cpt.conductor import Outcome
from phased_cpt.errors import InputError, LedgerRefuses
from tests.journeys.conftest import SHAPE, Ran, Tiny
from tests.zygote import ForkedJobs, Zygote

Weights = dict[str, numpy.ndarray]
SHORT = {"data": {"eval_share": 0}, "lora": {"r": 4, "alpha": 8, "target_modules": "auto", "dropout": 0.1}}


@dataclass(frozen=True)
class Instead:
    """The zygote, with a program of a test in the place of the worker."""

    zygote: Zygote
    program: str

    def ranks(self, program: str, *arguments: Any, **environment: str) -> list[int]:
        return self.zygote.ranks(self.program, *arguments, **environment)


def seen(arguments: list[str]) -> None:
    """In the ranks: the worker, who writes down what it starts from."""
    from deepspeed.runtime.zero import GatheredParameters
    from safetensors.torch import save_file

    from phased_cpt import worker
    from phased_cpt.train.publish import saved_names
    from tests.train.programs import gathered

    begin = worker.PhaseRun._begin

    def watched(run: worker.PhaseRun) -> None:
        found = {"loaded": gathered(run.model, keep=True)}
        begin(run)
        found["step0"] = gathered(run.model, keep=True)
        with GatheredParameters(list(run.model.parameters())):
            every = [(name, each.detach().cpu(), each.requires_grad) for name, each in run.model.named_parameters()]
        found["computed"] = {name: each.float() for name, each, learns in every if learns}
        floating = [(name, each) for name, each, learns in every if not learns and each.is_floating_point()]
        found["frozen"] = {
            name: each.float() for name, each in floating if ".base_layer." not in name or each.dim() > 1
        }
        names = saved_names(run.model, list(found["step0"]))
        if run.rank.first:
            for what, weights in found.items():
                save_file(
                    {names.get(name, name): each.clone() for name, each in weights.items()}, run.folder / f"{what}.st"
                )

    worker.PhaseRun._begin = watched  # type: ignore[method-assign]
    worker.main(arguments)


@pytest.fixture
def watched(zygote: Zygote) -> ForkedJobs:
    return ForkedJobs(Instead(zygote, "tests.journeys.test_handover:seen"))  # type: ignore[arg-type]


def at_start(outcome: Outcome, number: int, what: str) -> Weights:
    return load_file(outcome.run_dir.root / outcome.plan.phases[number - 1].folder / f"{what}.st")


def published(outcome: Outcome, number: int) -> Weights:
    folder = outcome.run_dir.root / outcome.plan.phases[number - 1].folder
    [weights] = folder.glob("best_*/*.safetensors")
    return load_file(weights)


def differ(one: Weights, other: Weights) -> int:
    """How many tensors are not the same, bit by bit."""
    assert one.keys() == other.keys()
    return sum(not numpy.array_equal(one[name].view("u4"), other[name].view("u4")) for name in one)


def bf16(weights: Weights) -> Weights:
    """Rounded to the nearest bf16, and as fp32 again."""
    bits = {name: each.view("u4").astype("u8") for name, each in weights.items()}
    return {name: ((b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000).astype("u4").view("f4") for name, b in bits.items()}


def phases(tiny: Tiny, *own: dict[str, Any], steps: int = 2) -> list[dict[str, Any]]:
    given = tiny()["phases"]
    return [{**given[at], "max_steps": steps, **each} for at, each in enumerate(own)]


KINDS = {  # how many of the 28 tensors of the adapter are others if the engine keeps what it makes of what was loaded
    "ZeRO-2, bf16": ({"model": {"precision": "bf16"}}, 28),
    "ZeRO-2, fp32": ({}, 0),
    "ZeRO-3, bf16": ({"model": {"precision": "bf16"}, "training": {"deepspeed": "zero3.json"}}, 28),
    "ZeRO-3, fp32": ({"training": {"deepspeed": "zero3.json"}}, 0),
    "QLoRA, ZeRO-2": ({"model": {"precision": "bf16", "use_4bit": True}}, 28),
}


@pytest.mark.requirement("S-01")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_handed_over_to_the_bit(kind: str, tiny: Tiny, ran: Ran, watched: ForkedJobs) -> None:
    sections, rounded = KINDS[kind]
    outcome = ran(tiny(**SHORT | sections, phases=phases(tiny, {}, {})), door=watched)
    first, start = published(outcome, 1), at_start(outcome, 2, "step0")
    assert len(first) == 28
    assert differ(start, first) == 0
    assert differ(published(outcome, 2), first) == 28, "it trained"
    # The negative control: without put_back, the engine goes on with what bf16 has left of them.
    loaded = at_start(outcome, 2, "loaded")
    assert differ(loaded, first) == rounded
    assert differ(loaded, bf16(first)) == 28 - (28 if rounded else 0)
    # What the model computes with are these masters, rounded to its own type.
    assert differ(at_start(outcome, 2, "computed"), bf16(first) if rounded else first) == 0


@pytest.mark.parametrize("stage", ["zero2", "zero3.json"])
def test_every_weight_is_handed_over_to_the_bit_from_full_training(
    stage: str, tiny: Tiny, ran: Ran, watched: ForkedJobs
) -> None:
    """full → full → LoRA, in bf16: the first two publish a base, in fp32."""
    whole = {"lora": {"enabled": False}}
    config = tiny(
        **SHORT, model={"precision": "bf16"}, training={"deepspeed": stage}, phases=phases(tiny, whole, whole, {})
    )
    outcome = ran(config, door=watched)
    first, second = published(outcome, 1), published(outcome, 2)
    assert len(first) == 21
    assert differ(at_start(outcome, 2, "step0"), first) == 0
    assert differ(at_start(outcome, 2, "loaded"), bf16(first)) == 0
    assert differ(bf16(first), first) > 15, "the control: what was loaded is not what was published"
    # The adapter stands on the second base, in the precision of the run, and not on the one before.
    frozen = {name.replace("base_model.model.", "").replace("base_layer.", ""): each for name, each in at_start(outcome, 3, "frozen").items()}  # fmt: skip
    assert differ({name: frozen[name] for name in second}, bf16(second)) == 0
    assert differ({name: frozen[name] for name in second}, bf16(first)) > 15
    assert outcome.finished
    for number, kind in ((1, "best_model"), (2, "best_model"), (3, "best_adapter")):
        folder = outcome.run_dir.root / outcome.plan.phases[number - 1].folder
        assert [path.name for path in folder.glob("best_*")] == [kind]
    assert (
        json.loads((outcome.run_dir.root / "phase1_foundation/best_model/config.json").read_text())["dtype"]
        == "float32"
    )


# An adapter from outside -----------------------------------------------------------------------------------------------


def made_outside(folder: str, shape: dict[str, Any]) -> list[str]:
    """In a rank: a base and an adapter on it, by transformers and PEFT alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    shape = dict(shape)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(shape.pop("model_type"), **shape), dtype=torch.float32
    )
    model.save_pretrained(f"{folder}/base")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    adapted.save_pretrained(f"{folder}/adapter")
    return sorted(name for name, weight in adapted.named_parameters() if weight.requires_grad)


@pytest.mark.requirement("S-05")
def test_an_adapter_from_outside_is_continued_or_refused(
    tiny: Tiny, ran: Ran, watched: ForkedJobs, zygote: Zygote, tmp_path: Path
) -> None:
    zygote.call("tests.journeys.test_handover:made_outside", str(tmp_path), SHAPE, folder=tmp_path / "made")
    outside = {"from_config": None, "name": "base", "adapter": "adapter", "precision": "bf16"}
    config = tiny(**SHORT, model=outside, phases=phases(tiny, {}, {}))

    def refused(lora: dict[str, Any], kind: type[Exception] = InputError) -> str:
        with pytest.raises(kind) as error:
            ran({**config, "lora": lora}, door=watched)
        return str(error.value)

    # What is written down must be what the adapter has; what is not written down does not stand in its way.
    said = refused({"r": 8, "alpha": 16})
    assert "lora.r is 8" in said and f"adapter {tmp_path / 'adapter'} has 4" in said
    said = refused({"alpha": 8})
    assert "lora.alpha is 8" in said and "has 16" in said
    said = refused({"target_modules": ["q_proj"]})
    assert "lora.target_modules is ['q_proj']" in said and "has ['down_proj', 'q_proj']" in said
    assert not Path("run/phase1_foundation").exists(), "and nothing has been trained"
    config["lora"] = {"target_modules": ["down_proj", "q_proj"], "dropout": 0.2}
    outcome = ran(config, door=watched, last="foundation")
    given = load_file("adapter/adapter_model.safetensors")
    assert differ(at_start(outcome, 1, "step0"), given) == 0
    assert differ(at_start(outcome, 1, "loaded"), given) == 8, "the control: bf16 would have rounded all of it"
    written = json.loads(Path("run/phase1_foundation/best_adapter/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 16, 0.2)

    # A base that has changed since is another one: a byte of its weights is enough.
    flip("base/model.safetensors")
    assert "base: was" in refused(config["lora"], LedgerRefuses)
    flip("base/model.safetensors")
    Path("base").rename("elsewhere")  # where it lies does not matter
    config["model"]["name"] = "elsewhere"
    assert ran(config, door=watched).trained == ("evolution",)


def flip(path: str | Path, at: int = -1) -> None:
    """Change one byte of a file, or change it back."""
    content = bytearray(Path(path).read_bytes())
    content[at] ^= 1
    Path(path).write_bytes(content)


BROKEN = {
    "a tensor is missing": "lora_B.weight is missing",
    "it is of another model": "size mismatch",
    "it is of another architecture": "not found in the base model",
}


def broken_adapter(folder: str, how: str) -> None:
    """In a rank: the adapter, spoiled."""
    import torch
    from safetensors.torch import load_file, save_file

    path = Path(folder) / "adapter_model.safetensors"
    config = Path(folder) / "adapter_config.json"
    weights = load_file(path)
    last = sorted(weights)[-1]
    if how == "a tensor is missing":
        weights.pop(last)
    elif how == "it is of another model":
        weights[last] = torch.zeros(7, 4)
    else:
        config.write_text(config.read_text().replace('"q_proj"', '"c_attn"').replace('"down_proj"', '"c_proj"'))
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("how", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused_by_the_ranks(
    how: str, tiny: Tiny, ran: Ran, zygote: Zygote, tmp_path: Path
) -> None:
    """PEFT would draw at random what is missing, and only warn."""
    zygote.call("tests.journeys.test_handover:made_outside", str(tmp_path), SHAPE, folder=tmp_path / "made")
    zygote.call("tests.journeys.test_handover:broken_adapter", str(tmp_path / "adapter"), how, folder=tmp_path / "made")
    outside = {"from_config": None, "name": "base", "adapter": "adapter"}
    with pytest.raises(Exception) as error:
        ran({**tiny(**SHORT, model=outside, phases=phases(tiny, {})), "lora": {}}, ranks=1)
    assert getattr(error.value, "exit_code", None) == 2
    assert BROKEN[how].lower() in str(error.value).lower() and str(tmp_path / "adapter") in str(error.value)
    assert not list(Path("run").glob("*/best_*"))
