"""After QLoRA: the base that was trained beside, tensor by tensor, and which of two bases is the better one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from phased_cpt.data.watch import Unwatched
from phased_cpt.errors import PhasedCptError
from phased_cpt.evals.heldout import measuring
from phased_cpt.merge import choice, quantised
from phased_cpt.merge.choice import Choice, choose
from phased_cpt.merge.empty import empty_model
from phased_cpt.merge.quantised import FourBits
from phased_cpt.merge.story import Materials, _materials, merge
from phased_cpt.merge.texts import Windows
from phased_cpt.merging import FourBitBase, Layer, MergeJob
from phased_cpt.model.base import load_base
from phased_cpt.published import weights_digest

LLAMA = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
IDS = torch.arange(48)[None] * 5 % 256
KEPT = FourBitBase("fp32", "auto")


@pytest.fixture(scope="module", params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and an adapter that says something."""
    root, shape = tmp_path_factory.mktemp("merge"), dict(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    for weight in model.parameters():
        weight.data *= 3  # what 4 bits take is then seen in the logits
    model.save_pretrained(root / "base")
    targets = ["c_attn", "c_fc"] if request.param is GPT2 else "all-linear"
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=request.param is GPT2
    )
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.05)
    adapted.save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


def loaded_in_4_bits(base: Path) -> PreTrainedModel:
    """As training loads it."""
    return load_base(
        base, precision="fp32", attention="eager", max_tokens=64, storage="auto", trust_remote_code=False, tell=print
    )


def job(folders: tuple[Path, Path], output: Path, **more: Any) -> MergeJob:
    base, adapter = folders
    return MergeJob(
        base=str(base),
        base_digest=weights_digest(base),
        adapters=(Layer(str(adapter), weights_digest(adapter)),),
        output=str(output),
        dtype="fp32",
        max_shard_size=2**30,
        **{"four_bits": KEPT, **more},
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad(), measuring(model):
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def test_a_weight_there_and_back_is_what_training_had(folders: tuple[Path, Path]) -> None:
    live, four_bits = loaded_in_4_bits(folders[0]), FourBits(empty_model(folders[0]), "fp32", "auto")
    plain = AutoModelForCausalLM.from_pretrained(folders[0])
    turned = plain.config.model_type == "gpt2"  # its layers keep their weights the other way round
    assert len(four_bits.names) > 3
    for name in four_bits.names:
        linear = live.get_submodule(name.removesuffix(".weight"))
        trained_beside = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        weight = plain.get_parameter(name).data
        back = four_bits.through(name, weight)
        assert torch.equal(back, trained_beside.T if turned else trained_beside)
        assert not torch.equal(back, weight), "the control: 4 bits take something"
    assert "lm_head.weight" not in four_bits.names


def test_rows_that_are_looked_up_keep_nothing_else_in_memory(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a vocabulary of 131K rows a view would keep a gigabyte for each token of the text that is walked."""
    materials = _materials(job(folders, tmp_path))
    rounded = materials.base(FourBits(empty_model(folders[0]), "fp32", "auto"))
    embedding = next(name for name in materials.places.of if "embed_tokens" in name or "wte" in name)
    linear = next(name for name in sorted(rounded.rounding.names) if "0" in name)
    for name in (embedding, linear):
        few, whole = rounded.rows(name, 3, 5), rounded.read(name)
        assert torch.equal(few, whole[3:5])
        assert few.untyped_storage().nbytes() == few.numel() * few.element_size()
        assert whole[3:5].untyped_storage().nbytes() > few.untyped_storage().nbytes(), "the control: a view"


@pytest.mark.requirement("M-04")
def test_merged_into_what_4_bits_left_it_is_the_model_that_was_trained(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    trained = PeftModel.from_pretrained(loaded_in_4_bits(folders[0]), str(folders[1]))
    off = {}
    for kind in ("dequantized", "bf16"):
        merge(job(folders, tmp_path / kind, base_kind=kind), Unwatched())
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        off[kind] = float((logits(merged) - logits(trained)).abs().max())
    assert off["dequantized"] < 1e-4
    assert off["bf16"] > 100 * off["dequantized"], "the control: the 16-bit base is another model"


@pytest.fixture
def materials(folders: tuple[Path, Path], tmp_path: Path) -> Materials:
    return _materials(job(folders, tmp_path / "merged"))


def windows(count: int = 2) -> Windows:
    ids = torch.randint(256, (count, 32), generator=torch.Generator().manual_seed(1))
    return Windows(ids, torch.arange(32).expand(ids.shape), ids, "held-out documents")


def chosen(materials: Materials, rows: Windows | None, asked: str = "auto") -> Choice:
    four_bits = FourBits(empty_model(Path(materials.job.base)), "fp32", "auto")
    outputs = {"bf16": materials.output(), "dequantized": materials.output(four_bits)}
    return choose(asked, outputs, materials.empty, rows, four_bits, materials.device, lambda said: None)


def test_auto_takes_the_base_that_loses_less(
    materials: Materials, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "FEWEST_TOKENS", 1)
    found = chosen(materials, windows())
    losses = found.facts["held_out_loss"]
    assert found.kind == min(losses, key=losses.__getitem__) and losses["bf16"] != losses["dequantized"]
    for kind, measured in losses.items():  # before anything is written; and of what is then written
        merge(job(folders, tmp_path / kind, base_kind=kind), Unwatched())
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        with torch.no_grad():
            written = model(windows().ids, labels=windows().ids, use_cache=False).loss
        assert measured == pytest.approx(float(written), abs=1e-4)
    assert found.facts["tokens"] == 64


def test_what_4_bits_took_is_told_beside_what_the_adapter_gave(materials: Materials) -> None:
    ratio = chosen(materials, None, "bf16").facts["residual_to_delta"]
    assert 0 < ratio["median"] <= ratio["most"] and ratio["layers"] >= 4


def test_where_nothing_can_be_measured_it_is_the_base_that_was_trained_beside(
    materials: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (chosen(materials, None).kind, "no held-out documents" in chosen(materials, None).why) == (
        "dequantized",
        True,
    )
    monkeypatch.setattr(choice, "CPU_OPERATIONS", 1e6)
    found = chosen(materials, windows())
    assert found.kind == "dequantized" and "too many to measure" in found.why
    assert chosen(materials, windows(), "bf16").kind == "bf16", "the control: what is asked for is not measured"


def test_weights_that_come_back_as_others_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CPU makes of 4-bit weights that have run in eval mode."""
    real = quantised.dequantize_4bit
    monkeypatch.setattr(quantised, "dequantize_4bit", lambda *packed: real(*packed).roll(1, 0))
    with pytest.raises(PhasedCptError, match="4 bits make something else of it"):
        merge(job(folders, tmp_path / "merged", base_kind="dequantized"), Unwatched())
    assert not (tmp_path / "merged").exists()
