"""What cannot be merged is refused by name, before anything is written."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import save_file

from phased_cpt.data.watch import Unwatched
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.merge.story import merge
from phased_cpt.merging import Layer, MergeJob
from tests.merge.conftest import Making
from tests.merge.kinds import ATTENTION, Made, job, plain, tensors, write_adapter, write_base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = LORA_A.replace("lora_A", "lora_B")


def config_of(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weights_of(folder: Path, changed: Callable[[dict[str, torch.Tensor]], object]) -> None:
    found = tensors(folder)
    changed(found)
    [path] = folder.glob("*.safetensors")
    save_file({name: each.contiguous() for name, each in found.items()}, path, {"format": "pt"})


@pytest.fixture
def it(made: Making, tmp_path: Path) -> Made:
    """One that may be damaged."""
    plain = made("plain")
    return Made(shutil.copytree(plain.base, tmp_path / "base"), shutil.copytree(plain.adapter, tmp_path / "adapter"))


def not_lora(it: Made) -> None:
    shutil.rmtree(it.adapter)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(plain(it.base), config).save_pretrained(it.adapter)


def resized(it: Made) -> None:
    """As PEFT saves it where tokens were added before training."""
    shutil.rmtree(it.adapter)
    model = plain(it.base)
    model.resize_token_embeddings(130)
    model.save_pretrained(it.base.parent / "wider")
    write_adapter(it.adapter, it.base.parent / "wider", **ATTENTION | {"modules_to_save": ["embed_tokens", "lm_head"]})
    shutil.rmtree(it.base.parent / "wider")


def of_another(it: Made, model: str, **shape: Any) -> None:
    shutil.rmtree(it.adapter)
    other = write_base(it.base.parent / "other", model, shape)
    write_adapter(it.adapter, other, **({"target_modules": ["c_attn"]} if model == "gpt2" else ATTENTION))
    shutil.rmtree(other)


def without_base_bias(it: Made) -> None:
    shutil.rmtree(it.adapter)
    write_adapter(it.adapter, it.base, **ATTENTION | {"lora_bias": True})


DAMAGES: dict[str, tuple[Callable[[Made], object], str]] = {
    "IA3": (not_lora, r"adapter: a .*IA3 adapter, which is not merged here; LoRA is"),
    "PiSSA": (lambda it: config_of(it.adapter, init_lora_weights="pissa_niter_4"), r"adapter: begun with init_lora_weights=pissa_niter_4.*path_initial_model_for_weight_conversion"),
    "OLoRA": (lambda it: config_of(it.adapter, init_lora_weights="olora"), r"begun with init_lora_weights=olora"),
    "aLoRA": (lambda it: config_of(it.adapter, alora_invocation_tokens=[1, 2]), r"an adapter with alora_invocation_tokens cannot be merged"),
    "repeated layers": (lambda it: config_of(it.adapter, layer_replication=[[0, 2], [1, 2]]), r"an adapter with layer_replication cannot be merged"),
    "a bias that the base has no place for": (without_base_bias, r"model.layers.0.self_attn.q_proj cannot be merged: .*bias"),
    "another vocabulary": (resized, r"embed_tokens.* is \[130, 32\], and has room for \[128, 32\] \(its vocabulary was resized"),
    "another architecture": (lambda it: of_another(it, "gpt2"), r"adapter: this adapter does not fit the base: .*c_attn"),
    "another width": (lambda it: of_another(it, "llama", hidden_size=64), r"adapter: this adapter does not fit the base: .*q_proj.* is \[4, 64\], and has room for \[4, 32\]"),
    "fewer layers": (lambda it: of_another(it, "llama", num_hidden_layers=1), r"adapter: this adapter does not fit the base: .*layers\.1\..* is missing"),
    "more layers": (lambda it: of_another(it, "llama", num_hidden_layers=3), r"adapter: this adapter does not fit the base: .*layers\.2\..* has no place"),
    "a tensor that is missing": (lambda it: weights_of(it.adapter, lambda found: found.pop(LORA_B)), r"does not fit the base: .*layers\.0.*lora_B.* is missing"),
    "a tensor too many": (lambda it: weights_of(it.adapter, lambda found: found.update(what=torch.ones(1))), r"does not fit the base: what has no place"),
    "a tensor of another shape": (lambda it: weights_of(it.adapter, lambda found: found.update({LORA_B: torch.ones(32, 5)})), r"lora_B.* is \[32, 5\], and has room for \[32, 4\]"),
    "no adapter_config.json": (lambda it: (it.adapter / "adapter_config.json").unlink(), r"adapter: no adapter \(it has no adapter_config.json\)"),
    "half an adapter_config.json": (lambda it: (it.adapter / "adapter_config.json").write_text('{"peft_type": "LO'), r"adapter: its adapter_config.json cannot be read"),
    "an adapter_config.json of nobody": (lambda it: (it.adapter / "adapter_config.json").write_text('["LORA"]'), r"adapter: its adapter_config.json cannot be read"),
    "no adapter weights": (lambda it: next(it.adapter.glob("*.safetensors")).unlink(), r"adapter: no weights in it \(adapter_model.safetensors\)"),
    "half a file of adapter weights": (lambda it: next(it.adapter.glob("*.safetensors")).write_bytes(b"\x10\0\0\0"), r"adapter_model.safetensors: no safetensors file that can be read"),
    "a base in 4 bits": (lambda it: base_config(it, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), r"base: its weights are kept in bitsandbytes, which nothing can be merged into; name the 16-bit model"),
    "a base in GPTQ": (lambda it: base_config(it, quantization_config={"quant_method": "gptq", "bits": 4}), r"base: its weights are kept in gptq"),
    "a base of an unknown kind": (lambda it: base_config(it, model_type="nobody_knows"), r"base: no model can be made of its config.json: .*nobody_knows"),
    "a base that lacks a tensor": (lambda it: weights_of(it.base, lambda found: found.pop("model.norm.weight")), r"base: nothing can be merged into it: model.norm.weight is missing in its files"),
    "a base that lacks two": (lambda it: weights_of(it.base, lambda found: (found.pop("model.norm.weight"), found.pop("lm_head.weight"))), r"lm_head.weight, and 1 more are missing|model.norm.weight, and 1 more are missing"),
}  # fmt: skip


def base_config(it: Made, **values: Any) -> None:
    path = it.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.requirement("M-02")
@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_refused_by_name_and_nothing_is_written(damage: str, it: Made, output: Path, tmp_path: Path) -> None:
    change, words = DAMAGES[damage]
    change(it)
    before = {path.name for path in tmp_path.iterdir()}
    asked = MergeJob(str(it.base), "of-the-base", (Layer(str(it.adapter), "any"),), str(output), "fp32", 2**30)
    with pytest.raises(InputError, match=words) as refused:
        merge(asked, Unwatched())
    assert "\n" not in str(refused.value), "one line"
    assert {path.name for path in tmp_path.iterdir()} == before, "neither a merged model nor the beginning of one"


def test_the_control_is_merged(it: Made, output: Path) -> None:
    merge(job(it.base, it.adapter, output), Unwatched())
    assert output.is_dir()


def test_an_adapter_that_has_changed_since_it_was_asked_for(it: Made, output: Path, tmp_path: Path) -> None:
    asked = job(it.base, it.adapter, output)
    weights_of(it.adapter, lambda found: found[LORA_B].mul_(2))
    with pytest.raises(PhasedCptError, match="adapter: the adapter has changed since the merge was asked for"):
        merge(asked, Unwatched())
    assert not output.exists() and not (tmp_path / ".merged_model.building").exists()
    merge(replace(asked, adapters=job(it.base, it.adapter, output).adapters), Unwatched())


@pytest.mark.requirement("M-02")
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [LORA_A, LORA_B])
def test_an_adapter_that_is_not_finite_is_refused_with_the_place(
    name: str, number: float, it: Made, output: Path
) -> None:
    def damaged(found: dict[str, torch.Tensor]) -> None:
        found[name][1, 2] = number

    weights_of(it.adapter, damaged)
    with pytest.raises(PhasedCptError, match=r"model\.layers\.0\.self_attn\.q_proj.*(not finite|nan off)"):
        merge(job(it.base, it.adapter, output), Unwatched())
    assert not output.exists()


@pytest.mark.parametrize("where", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_base_that_is_not_finite_is_refused_with_the_place(where: str, it: Made, output: Path) -> None:
    """One that is merged into, and one that is copied."""
    weights_of(it.base, lambda found: found[where].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(PhasedCptError, match=rf"{where.removesuffix('.weight')}.*(not finite|nan off)"):
        merge(job(it.base, it.adapter, output), Unwatched())
    assert not output.exists()


def test_numbers_too_large_for_the_type_are_refused(it: Made, output: Path) -> None:
    """Finite in fp32, and infinite in fp16."""
    weights_of(it.base, lambda found: found["model.layers.0.self_attn.q_proj.weight"].view(-1)[3:4].fill_(1e5))
    with pytest.raises(PhasedCptError, match=r"q_proj.weight is not finite"):
        merge(job(it.base, it.adapter, output, dtype="fp16"), Unwatched())
    assert not output.exists()


BASES: dict[str, Callable[[Path], object]] = {
    "a copied tensor of another shape": lambda base: reshaped(base, "model.norm.weight"),
    "a merged tensor of another shape": lambda base: reshaped(base, "model.layers.0.self_attn.q_proj.weight"),
    "a file that was cut off": lambda base: os.truncate(base / "model.safetensors", 50_000),
}


def reshaped(base: Path, name: str) -> None:
    weights_of(base, lambda found: found.update({name: found[name][:-1]}))


@pytest.mark.parametrize("damage", BASES)
def test_a_base_that_is_damaged_is_refused_before_anything_is_written(
    damage: str, it: Made, output: Path, tmp_path: Path
) -> None:
    BASES[damage](it.base)
    asked = job(it.base, it.adapter, output)
    with pytest.raises(InputError, match=r"base.*"):
        merge(asked, Unwatched())
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
