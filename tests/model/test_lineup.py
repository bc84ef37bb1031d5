"""Base beside every phase in one model: each is what it would be if it were loaded alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.model.lineup import Lineup, line_up
from phased_cpt.wanted import ModelsWanted
from tests.chat.conftest import without_threads  # noqa: F401 - a fixture
from tests.chat.runs import trained_run
from tests.conftest import TOKENIZER
from tests.journeys.conftest import zygote  # noqa: F401 - a fixture
from tests.zygote import Zygote

IDS = torch.arange(5, 45)[None]
FOUNDATION, EVOLUTION = "phase1_foundation/best_adapter", "phase2_evolution/best_adapter"


@pytest.fixture(scope="module")
def run(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return trained_run(zygote, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def lined_up(run: Path, said: list[str] | None = None, **wanted: object) -> Lineup:
    models = ModelsWanted(**({"run_dir": run, "device": "cpu"} | wanted))  # type: ignore[arg-type]
    return line_up(models, tell=(said if said is not None else []).append)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def logits_as(lineup: Lineup, *names: str) -> list[torch.Tensor]:
    found = []
    for name in names:
        with lineup.as_(name) as model:
            found.append(logits(model))
    return found


def fresh(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()  # type: ignore[no-untyped-call]
    return model


@pytest.mark.requirement("I-01")
def test_base_is_the_base_to_the_bit_and_no_phase_is(run: Path) -> None:
    """What PeftModel.from_pretrained(base) leaves behind as `base` has its adapter on: the control shows that."""
    lineup = lined_up(run)
    assert lineup.names == ("base", "foundation", "evolution") and lineup.tuned == "evolution"
    base, foundation, evolution, base_again = logits_as(lineup, "base", "foundation", "evolution", "base")
    untouched = fresh(run / "random_base")
    alone = logits(untouched)
    assert torch.equal(base, alone) and torch.equal(base_again, alone)
    assert (foundation - base).abs().max() > 0.1 and (evolution - foundation).abs().max() > 0.1
    PeftModel.from_pretrained(untouched, str(run / EVOLUTION)).eval()
    assert not torch.equal(logits(untouched), alone), "so an adapter that is not off would have been seen"


@pytest.mark.requirement("I-01")
@pytest.mark.parametrize("name, folder", [("foundation", FOUNDATION), ("evolution", EVOLUTION)])
def test_a_phase_is_what_plain_peft_makes_of_its_adapter(name: str, folder: str, run: Path) -> None:
    alone = PeftModel.from_pretrained(fresh(run / "random_base"), str(run / folder)).eval()
    (beside,) = logits_as(lined_up(run), name)
    assert torch.equal(beside, logits(alone))  # type: ignore[arg-type]


def stack(run: Path) -> None:
    """As if foundation had handed over so: its adapter below that of evolution, both active at once."""
    record = json.loads((run / "run.json").read_text())
    below, top = (phase["published"]["adapters"] for phase in record["phases"])
    record["phases"][1]["published"]["adapters"] = [*below, *top]
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.requirement("I-01", "L-05")
def test_of_a_stack_all_are_active_at_once_and_for_the_base_all_are_off(copy: Path) -> None:
    stack(copy)
    lineup = lined_up(copy)
    base, foundation, evolution, base_again = logits_as(lineup, "base", "foundation", "evolution", "base")
    assert torch.equal(base, logits(fresh(copy / "random_base"))) and torch.equal(base, base_again)
    alone = PeftModel.from_pretrained(fresh(copy / "random_base"), str(copy / EVOLUTION)).eval()
    top = logits(alone)  # type: ignore[arg-type]
    alone.load_adapter(str(copy / FOUNDATION), "below")
    alone.base_model.set_adapter(["default", "below"])
    assert torch.equal(evolution, logits(alone))  # type: ignore[arg-type]
    assert (evolution - top).abs().max() > 0.1 and (evolution - foundation).abs().max() > 0.1, "the control"
    from phased_cpt.model.reload import load_published

    assert torch.equal(logits(load_published(copy)[0]), evolution)  # type: ignore[arg-type]


def test_as_strong_as_is_said_and_then_as_before(copy: Path) -> None:
    stack(copy)
    lineup = lined_up(copy)
    (whole,) = logits_as(lineup, "evolution")
    with lineup.as_("evolution", 0.0) as model:
        nothing = logits(model)
    with lineup.as_("evolution", 0.5) as model:
        half = logits(model)
    assert torch.equal(nothing, logits_as(lineup, "base")[0])
    assert not torch.equal(half, whole) and not torch.equal(half, nothing)
    assert torch.equal(whole, logits_as(lineup, "evolution")[0])


def test_memory_is_given_back_of_what_is_not_asked_for_any_more(copy: Path) -> None:
    shutil.copytree(copy / "random_base", copy / "merged_model")
    said: list[str] = []
    lineup = lined_up(copy, said)
    lineup.load("evolution")
    lineup.drop_all_but(["foundation"])
    first = lineup.load("base")
    lineup.drop_all_but(["merged"])
    lineup.load("merged")
    assert said == [], "never two at once"
    assert lineup.load("base") is not first and "another model" in said[0]


@pytest.mark.requirement("I-01")
def test_modules_that_an_adapter_has_saved_whole_are_off_for_the_base(run: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(fresh(run / "random_base"), config)
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(str(tmp_path / "own"))
    shutil.copy(TOKENIZER, tmp_path / "own")
    lineup = lined_up(run, run_dir=None, adapter=tmp_path / "own", base=str(run / "random_base"))
    base, adapter = logits_as(lineup, "base", "adapter")
    assert torch.equal(base, logits(fresh(run / "random_base")))
    assert not torch.equal(base, adapter)


def test_weights_of_their_own_are_loaded_when_they_are_asked_for(copy: Path) -> None:
    said: list[str] = []
    merged = PeftModel.from_pretrained(fresh(copy / "random_base"), str(copy / EVOLUTION)).merge_and_unload()
    merged.save_pretrained(copy / "merged_model")
    lineup = lined_up(copy, said)
    assert lineup.names == ("base", "foundation", "evolution", "merged") and lineup.tuned == "evolution"
    (evolution,) = logits_as(lineup, "evolution")
    assert said == []
    (found,) = logits_as(lineup, "merged")
    assert "another model" in said[0]
    assert torch.allclose(found, evolution, atol=1e-4) and not torch.equal(found, logits_as(lineup, "foundation")[0])


def test_a_phase_that_trained_every_weight_has_the_next_adapter_upon_it(copy: Path) -> None:
    """base ─ foundation, whole ─ evolution, an adapter on that: two models, and three names."""
    from phased_cpt.published import weights_digest

    whole = copy / "phase1_foundation/best_model"
    model = fresh(copy / "random_base")
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    model.save_pretrained(whole)
    shutil.copy(copy / FOUNDATION / "tokenizer.json", whole)
    record = json.loads((copy / "run.json").read_text())
    place = {"base": weights_digest(whole), "folder": "phase1_foundation/best_model"}
    record["phases"][0]["published"] = {"kind": "base", "adapters": [], **place}
    record["phases"][1]["published"] |= place
    (copy / "run.json").write_text(json.dumps(record))

    said: list[str] = []
    lineup = lined_up(copy, said)
    foundation, evolution = logits_as(lineup, "foundation", "evolution")
    assert said == [], "they are one model, the adapter off and on"
    (base,) = logits_as(lineup, "base")
    assert "base has weights of its own" in said[0]
    assert torch.equal(foundation, logits(model)) and torch.equal(base, logits(fresh(copy / "random_base")))
    assert not torch.equal(foundation, evolution) and not torch.equal(foundation, base)


def test_an_adapter_and_its_base_from_anywhere(run: Path) -> None:
    found = lined_up(run, run_dir=None, adapter=run / EVOLUTION, base=str(run / "random_base"))
    assert (found.names, found.tuned, found.run) == (("base", "adapter"), "adapter", None)
    of_run = lined_up(run)
    assert torch.equal(logits_as(found, "adapter")[0], logits_as(of_run, "evolution")[0])
    assert torch.equal(logits_as(found, "base")[0], logits_as(of_run, "base")[0])
    # What it says of its base in adapter_config.json is enough.
    assert lined_up(run, run_dir=None, adapter=run / EVOLUTION).names == ("base", "adapter")


def test_four_bits_on_a_cpu_stay_what_they_are(run: Path) -> None:
    """A forward in eval mode would pack them anew, and the next forward would read other weights."""
    lineup = lined_up(run, use_4bit=True)
    first, tuned, second, again = logits_as(lineup, "base", "evolution", "base", "evolution")
    assert torch.equal(first, second) and torch.equal(tuned, again) and not torch.equal(first, tuned)
    (whole,) = logits_as(lined_up(run), "base")
    assert 0 < (first - whole).abs().max() < 0.2 * whole.abs().max(), "the same weights, coarser"


def test_what_cannot_be_lined_up_is_said(copy: Path, tmp_path: Path) -> None:
    def refused(**wanted: object) -> str:
        with pytest.raises(PhasedCptError) as error:
            lined_up(copy, **wanted)  # type: ignore[arg-type]
        return str(error.value)

    assert "no run has begun here" in refused(run_dir=tmp_path)
    assert f"type --adapter {copy / EVOLUTION}" in refused(run_dir=None, model=copy / EVOLUTION)
    assert "this is no adapter" in refused(run_dir=None, adapter=copy / "random_base")
    assert "this is no model" in refused(run_dir=None, model=tmp_path)
    assert "no such folder (looked from" in refused(run_dir=None, adapter=copy / EVOLUTION, base="./nowhere")
    assert "--device gpu: there is no such device" in refused(device="gpu")
    assert "this is not the base of the run" in refused(base=str(_other_base(copy, tmp_path)))

    lineup = lined_up(copy)
    with pytest.raises(InputError, match="did you mean evolution"), lineup.as_("evoluton"):
        pass


def test_an_adapter_that_was_changed_or_does_not_fit_is_refused(copy: Path) -> None:
    path = copy / EVOLUTION / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: each for name, each in tensors.items() if "layers.1.mlp.up" not in name}, path)
    with pytest.raises(PhasedCptError, match="not what was published; restore it, or train the phase again"):
        lined_up(copy)
    with pytest.raises(InputError, match="the weights are not what was published"):
        lined_up(copy, run_dir=None, adapter=copy / EVOLUTION, base=str(copy / "random_base"))
    (copy / EVOLUTION / "source.json").unlink()  # nobody's, from here on
    with pytest.raises(InputError, match=r"does not fit .*layers\.1\.mlp\.up_proj.* is missing"):
        lined_up(copy, run_dir=None, adapter=copy / EVOLUTION, base=str(copy / "random_base")).load("adapter")
    save_file(tensors | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, path)
    with pytest.raises(InputError, match=r"layers\.7.* has no place"):
        lined_up(copy, run_dir=None, adapter=copy / EVOLUTION, base=str(copy / "random_base")).load("adapter")


def _other_base(run: Path, folder: Path) -> Path:
    model = fresh(run / "random_base")
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    model.save_pretrained(folder / "other")
    return folder / "other"
