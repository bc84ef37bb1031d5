"""The files of a merged model are those of its base: names, types, order; cut by size, and rounded once."""

import json
import shutil
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phased_cpt.data.watch import Unwatched
from phased_cpt.merge.story import merge
from tests.merge.conftest import Making
from tests.merge.kinds import EXACT, KINDS, Made, apart, heads, job, logits, make, marker, plain, tensors, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of tied weights

# Where an adapter changes one of two that were one, the other gets a place of its own.
UNTIED = ("tied, embeddings", "tied, head", "tied, embeddings whole", "tied, head whole", "tied, both whole")
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def all_heads(folder: Path) -> dict[str, tuple[str, list[int]]]:
    return dict(chain.from_iterable(each.items() for each in heads(folder).values()))


def layers(names: Iterable[str]) -> list[str]:
    """In what order they come; what is made together, such as weight and bias, comes together."""
    return [
        *dict.fromkeys(name.partition(".experts.")[0].removesuffix(".weight").removesuffix(".bias") for name in names)
    ]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names whose tensors are the same, to the bit."""
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])]


def rewritten(it: Made, folder: Path, **types: torch.dtype) -> Made:
    """The same base, in bf16 but for tensors that have one of these words in their names."""
    shutil.copytree(it.base, folder)
    found = {
        name: each.to(next((dtype for word, dtype in types.items() if word in name), torch.bfloat16)).contiguous()
        for name, each in tensors(it.base).items()
    }
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return Made(folder, it.adapter)


@pytest.mark.requirement("M-01")
@pytest.mark.parametrize("kind", KINDS)
def test_names_types_shapes_and_order_are_those_of_the_base(kind: str, made: Making, output: Path) -> None:
    it = made(kind)
    merge(job(it.base, it.adapter, output), Unwatched())
    base, found = heads(it.base)["model.safetensors"], heads(output)["model.safetensors"]
    assert {name: found[name] for name in base} == base
    assert layers(found)[: len(layers(base))] == layers(base)
    config = json.loads((output / "config.json").read_text())
    assert list(found)[len(base) :] == (["lm_head.weight"] if kind in UNTIED else [])
    assert marker(output)["untied"] == (["lm_head.weight"] if kind in UNTIED else [])
    if kind.startswith("tied"):
        assert config["tie_word_embeddings"] is (kind not in UNTIED)


def test_experts_are_written_one_by_one_as_the_base_has_them(made: Making, output: Path) -> None:
    it = made("experts")
    merge(job(it.base, it.adapter, output), Unwatched())
    found = all_heads(output)
    assert found["model.layers.1.mlp.experts.3.gate_proj.weight"] == ("F32", [16, 32])
    assert not [name for name in found if "gate_up" in name], "as they are called in memory"
    mine, before = tensors(output), tensors(it.base)
    changed = mine.keys() - same(mine, before)
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    assert len([name for name in changed if ".experts." in name]) == 2 * 4 * 3


def test_what_no_adapter_changes_is_copied_to_the_bit(made: Making, output: Path) -> None:
    it = made("plain")
    merge(job(it.base, it.adapter, output), Unwatched())
    mine, before = tensors(output), tensors(it.base)
    assert {name.split(".")[-2] for name in mine.keys() - same(mine, before)} == {"q_proj", "down_proj"}


@pytest.mark.requirement("M-03")
@pytest.mark.parametrize("largest", [1, 5_000, 20_000, 40_000])
def test_no_file_is_larger_than_asked_but_for_a_tensor_that_is(largest: int, made: Making, output: Path) -> None:
    it = made("plain")
    merge(job(it.base, it.adapter, output, shard=largest), Unwatched())
    files = heads(output)
    sizes = {name: {tensor: tensors(output)[tensor].nbytes for tensor in held} for name, held in files.items()}
    assert len(files) > 2
    for name, held in sizes.items():
        assert sum(held.values()) <= largest or len(held) == 1, name
    following = [*sizes.values()]
    for held, then in pairwise(following):
        assert sum(held.values()) + next(iter(then.values())) > largest, "no file is cut before it must be"
    assert [*files] == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {tensor: name for name, held in files.items() for tensor in held}
    assert index["metadata"]["total_size"] == sum(sum(held.values()) for held in following)
    assert [*all_heads(output)] == [*all_heads(it.base)]
    assert apart(logits(plain(output)), logits(it.live())) <= EXACT


def test_a_base_in_many_files_gives_the_same_as_one_in_one(made: Making, output: Path, tmp_path: Path) -> None:
    it = made("experts")
    model = plain(it.base)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(heads(tmp_path / "base")) > 3
    merge(job(tmp_path / "base", it.adapter, output, shard=30_000), Unwatched())
    merge(job(it.base, it.adapter, tmp_path / "one"), Unwatched())
    assert len(same(tensors(output), tensors(tmp_path / "one"))) == len(tensors(output))


# Types ------------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("M-01")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["rsLoRA", "DoRA", "experts", "GPT-2's Conv1D", "every bias", "tied, head"])
def test_a_16_bit_model_is_the_exact_one_rounded_once(
    kind: str, dtype: str, made: Making, output: Path, tmp_path: Path
) -> None:
    """PEFT, merging in bf16, rounds the product and the sum."""
    it = rewritten(made(kind), tmp_path / "base")
    merge(job(it.base, it.adapter, output, dtype=dtype), Unwatched())
    merge(job(it.base, it.adapter, tmp_path / "exact", dtype="fp32"), Unwatched())
    rounded, exact = tensors(output), tensors(tmp_path / "exact")
    to = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert same(rounded, {name: each.to(to) for name, each in exact.items()}) == [*rounded]
    assert {each.dtype for each in exact.values()} == {torch.float32}
    assert len(same({name: each.float() for name, each in rounded.items()}, exact)) < len(rounded), "it was rounded"
    assert json.loads((output / "config.json").read_text())["dtype"] == str(to).removeprefix("torch.")
    assert plain(output, dtype="auto").dtype == to


def test_merging_in_bf16_would_be_another_model(made: Making, output: Path, tmp_path: Path) -> None:
    """The negative control of the test above."""
    it = rewritten(made("rsLoRA"), tmp_path / "base")
    merge(job(it.base, it.adapter, output, dtype="auto"), Unwatched())
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(plain(it.base, dtype=torch.bfloat16), it.adapter, autocast_adapter_dtype=False)
    ours = plain(output, dtype=torch.bfloat16).state_dict()
    assert len(same(ours, theirs.merge_and_unload().state_dict())) < len(ours)


def test_a_base_in_fp32_is_bf16_when_that_is_asked_for(made: Making, output: Path) -> None:
    it = made("plain")
    merge(job(it.base, it.adapter, output, dtype="bf16"), Unwatched())
    assert {dtype for dtype, _ in all_heads(output).values()} == {"BF16"}
    assert {dtype for dtype, _ in all_heads(it.base).values()} == {"F32"}
    facts = marker(output)["logits"]
    assert not facts["exact"] and 0 < facts["relative"] < 0.05 and facts["agreed"] == facts["clear"]


@pytest.mark.parametrize("asked", ["auto", "bf16", "fp16", "fp32"])
def test_what_the_base_keeps_in_a_type_of_its_own_stays_in_it(
    asked: str, made: Making, output: Path, tmp_path: Path
) -> None:
    """Norms in fp32 beside weights in bf16: one is copied, and one is what the adapter has saved whole."""
    it = rewritten(made("a norm whole"), tmp_path / "base", norm=torch.float32)
    merge(job(it.base, it.adapter, output, dtype=asked), Unwatched())
    base, found = all_heads(it.base), all_heads(output)
    assert {name for name, (dtype, _) in base.items() if dtype == "F32"} == {name for name in base if "norm" in name}
    usual = {"auto": "BF16", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}[asked]
    assert {name: dtype for name, (dtype, _) in found.items()} == {
        name: "F32" if "norm" in name else usual for name in base
    }
    saved = tensors(it.adapter)["base_model.model.model.norm.weight"]
    assert torch.equal(tensors(output)["model.norm.weight"], saved)
    assert not torch.equal(tensors(it.base)["model.norm.weight"], saved)


def test_tensors_that_the_model_has_no_place_for_are_kept(made: Making, output: Path, tmp_path: Path) -> None:
    """Older files hold buffers that are computed today."""
    it = made("plain")
    shutil.copytree(it.base, tmp_path / "base")
    more = {"model.rotary_emb.inv_freq": torch.arange(4.0), "model.layers.0.mask": torch.tensor([True, False])}
    save_file(tensors(it.base) | more, tmp_path / "base/model.safetensors", {"format": "pt"})
    merge(job(tmp_path / "base", it.adapter, output, dtype="bf16"), Unwatched())
    found = tensors(output)
    assert found["model.layers.0.mask"].tolist() == [True, False]
    assert found["model.rotary_emb.inv_freq"].tolist() == [0, 1, 2, 3]


# Older formats ----------------------------------------------------------------------------------------------------------


def pickled(base: Path, folder: Path, files: int) -> Path:
    """The base, as torch.save has written it, with every name that its state_dict has."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    state = plain(base).state_dict()
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    where = {name: f"pytorch_model-{at % files + 1:05}-of-{files:05}.bin" for at, name in enumerate(state)}
    for file in set(where.values()):
        torch.save({name: each for name, each in state.items() if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "GPT-2's Conv1D"])
def test_a_base_in_bin_files_merges_to_the_same(kind: str, files: int, made: Making, output: Path, tmp_path: Path) -> None:  # fmt: skip
    it = made(kind)
    base = pickled(it.base, tmp_path / "base", files)
    merge(job(base, it.adapter, output), Unwatched())
    merge(job(it.base, it.adapter, tmp_path / "other"), Unwatched())
    found, other = tensors(output), tensors(tmp_path / "other")
    shared = {name: found[name] for name in other}
    assert len(same(shared, other)) == len(other) > 10
    assert not list(output.glob("*.bin"))
    assert apart(logits(plain(output)), logits(it.live())) <= EXACT


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("tied")])
def test_tied_embeddings_that_the_base_has_written_twice(kind: str, made: Making, output: Path, tmp_path: Path) -> None:
    """torch.save writes one tensor by both of its names."""
    it = made(kind)
    base = pickled(it.base, tmp_path / "base", 1)
    merge(job(base, it.adapter, output), Unwatched())
    assert apart(logits(plain(output)), logits(it.live())) <= EXACT
    found, config = tensors(output), json.loads((output / "config.json").read_text())
    if not torch.equal(found.get("lm_head.weight", torch.zeros(0)), found["model.embed_tokens.weight"]):
        # transformers looks at what differs; vLLM and llama.cpp believe the config.
        assert config["tie_word_embeddings"] is ("lm_head.weight" not in found)


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.bfloat16) for kind in KINDS), ("plain", torch.float16)])
def test_an_adapter_that_was_saved_in_16_bits(
    kind: str, dtype: torch.dtype, made: Making, output: Path, tmp_path: Path
) -> None:
    """As most of PEFT's are, on a base in 16 bits."""
    it = made(kind)
    for folder, name in ((it.base, "model.safetensors"), (it.adapter, "adapter_model.safetensors")):
        shutil.copytree(folder, tmp_path / folder.name)
        path = tmp_path / folder.name / name
        save_file({key: each.to(dtype) for key, each in load_file(path).items()}, path, metadata={"format": "pt"})
    facts = merge(job(tmp_path / it.base.name, tmp_path / it.adapter.name, output, dtype="auto"), Unwatched())
    assert facts["dtype"] == str(dtype).removeprefix("torch.") and facts["logits"]["spread"] < 0.01


# What stands beside -----------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_a_model_needs_and_no_trace_of_the_making(tmp_path: Path, output: Path) -> None:
    it = make("plain", tmp_path / "it")
    (it.base / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": 2}))
    (it.base / "modeling_own.py").write_text("# code\n")
    merge(job(it.base, it.adapter, output, shard=20_000), Unwatched())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "merged_model"]
    names = {path.name for path in output.iterdir() if path.suffix != ".safetensors"}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors.index.json", "modeling_own.py", "README.md",
        "merge.json",
    }  # fmt: skip
    assert json.loads((output / "generation_config.json").read_text())["temperature"] == 0.5
    facts = marker(output)
    assert facts["files"].keys() == {path.name for path in output.iterdir()} - {"merge.json"}
    assert all((output / name).stat().st_size == each["bytes"] for name, each in facts["files"].items())


def test_an_adapter_is_merged_into_what_was_merged(made: Making, output: Path, tmp_path: Path) -> None:
    """Phase after phase: the output is a base like any other."""
    it = made("plain")
    merge(job(it.base, it.adapter, tmp_path / "first"), Unwatched())
    second = write_adapter(tmp_path / "second", tmp_path / "first", seed=2, target_modules="all-linear")
    merge(job(tmp_path / "first", second, output), Unwatched())
    assert apart(logits(plain(output)), logits(Made(tmp_path / "first", second).live())) <= EXACT
    assert apart(logits(plain(output)), logits(Made(it.base, second).live())) > 1e-3, "the control: of another base"
