"""The base that a run begins with: found, told by its bytes, and refused with its reason before anything is prepared."""

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy
import pytest
from safetensors.numpy import save_file

from phased_cpt.bases import Base, find_base
from phased_cpt.config import from_record
from phased_cpt.errors import InputError
from phased_cpt.plan import make_plan

CONFIG = {"model_type": "llama", "hidden_size": 8, "vocab_size": 100}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "/one"}
PHASES = [{"name": "one", "sources": "a.jsonl"}]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(folder: str, files: dict[str, Any], value: float = 1.0, weights: str = "model.safetensors") -> Path:
    """A folder with JSON files and one of weights."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(folder) / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if weights:
        save_file({"a": numpy.full((4, 4), value, "f4")}, f"{folder}/{weights}")
    return Path(folder)


def base(lora: dict[str, Any] | None = None, **model: Any) -> Base:
    record = {"model": model, "lora": lora or {}, "phases": PHASES}
    return find_base(make_plan(from_record(record, "run.yaml")), Path("run").resolve(), Path("cache"))


def refused(lora: dict[str, Any] | None = None, **model: Any) -> str:
    with pytest.raises(InputError) as error:
        base(lora, **model)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_base_is_told_by_its_bytes_and_not_by_its_place() -> None:
    written("one", {"config.json": CONFIG})
    written("elsewhere/two", {"config.json": CONFIG, "README.md": "other words"})
    one = base(name="one")
    assert one.digest == base(name="elsewhere/two").digest == base(name=str(Path("one").resolve())).digest
    assert one.folder == str(Path("one").resolve())
    written("three", {"config.json": CONFIG}, value=1.0000001)
    written("four", {"config.json": CONFIG | {"rope_theta": 1e6}})
    assert len({one.digest, base(name="three").digest, base(name="four").digest}) == 3


def test_a_byte_that_changes_in_place_is_noticed() -> None:
    path = written("one", {"config.json": CONFIG}) / "model.safetensors"
    os.utime(path, (1e9, 1e9))
    before = base(name="one").digest
    assert base(name="one").digest == before, "remembered"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))  # the same size and time, but not the same change time
    assert base(name="one").digest != before


def test_random_weights_are_told_by_their_shape_and_seed() -> None:
    one = base(from_config=CONFIG)
    Path("config.json").write_text(json.dumps(CONFIG))
    assert one.digest == base(from_config="config.json").digest == base(from_config=".").digest
    assert one.digest != base(from_config=CONFIG | {"hidden_size": 16}).digest
    assert (one.folder, one.hidden_size, one.size_bytes) == (str(Path("run/random_base").resolve()), 8, 0)


@pytest.mark.requirement("L-02")
def test_a_hub_id_is_found_in_the_cache_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = written(f"hub/models--some--model/snapshots/{commit}", {"config.json": CONFIG})
    ref = Path("hub/models--some--model/refs/main")
    ref.parent.mkdir()
    ref.write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(Path("hub").resolve()))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = base(name="some/model")
    assert (found.folder, found.commit) == (str(snapshot.resolve()), commit)
    assert found.weights.model_dump()["commit"] == commit, "run.json says which"
    assert found.weights.digest == found.weights.model_copy(update={"commit": "another"}).digest, "but by its digest"
    assert found.digest != base(name=str(snapshot)).digest
    assert "model.name: some/other: not in the hub's cache" in refused(name="some/other")
    assert "not in the hub's cache" in refused(name="some/model", revision="v2")
    (snapshot / "model.safetensors").unlink()
    assert "some/model has no weights" in refused(name="some/model")


INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a folder without a model": ({"notes.txt": "hello"}, "", "m is no model (it has no config.json)"),
    "an adapter": ({"adapter_config.json": LORA}, "adapter_model.safetensors", "m is an adapter, which is named as model.adapter"),
    "an adapter that we have published": ({"adapter_config.json": LORA, "config.json": CONFIG}, "adapter_model.safetensors", "m is an adapter, which is named as model.adapter"),
    "a config that is cut off": ({"config.json": '{"model_type": "ll'}, "model.safetensors", "m has no config.json that can be read"),
    "a config that is a list": ({"config.json": [1]}, "model.safetensors", "m has a config.json that holds no object"),
    "no weights": ({"config.json": CONFIG}, "", "m has no weights in it (*.safetensors)"),
    "a shard that is missing": ({"config.json": CONFIG, "model.safetensors.index.json": INDEX}, "model-1.safetensors", "m lacks model-2.safetensors (1 of 2 files that its index names)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_model_is_refused(what: str) -> None:
    files, weights, said = REFUSED[what]
    written("m", files, weights=weights)
    assert f"model.name: {said}" in refused(name="m")


@pytest.mark.parametrize("key", ["name", "adapter"])
def test_a_place_that_is_not_there_is_refused(key: str) -> None:
    written("m", {"config.json": CONFIG})
    Path("file").write_text("")
    model = {"name": "m"}
    assert f"model.{key}: ./nowhere: no such folder (looked from {Path.cwd()})" in refused(**model | {key: "./nowhere"})
    assert f"model.{key}: file: no such folder" in refused(**model | {key: "file"})
    assert "there is no such user" in refused(**model | {key: "~nobody-of-that-name/m"})


def test_an_adapter_beside_the_base_is_told_by_its_meaning_and_its_bytes() -> None:
    written("m", {"config.json": CONFIG})
    written("one", {"adapter_config.json": LORA}, weights="adapter_model.safetensors")
    moved = LORA | {"base_model_name_or_path": "/two", "peft_version": "1"}
    written("two", {"adapter_config.json": moved}, weights="adapter_model.safetensors")
    written("stronger", {"adapter_config.json": LORA | {"lora_alpha": 9}}, weights="adapter_model.safetensors")
    one = base(name="m", adapter="one")
    assert one.weights.digest == base(name="m", adapter="two").weights.digest
    assert one.weights.digest != base(name="m", adapter="stronger").weights.digest
    assert one.weights.digest != base(name="m").weights.digest


def test_an_adapter_that_cannot_be_continued_is_refused() -> None:
    written("m", {"config.json": CONFIG})
    assert "no adapter_config.json that can be read" in refused(name="m", adapter="m")
    written("ia3", {"adapter_config.json": LORA | {"peft_type": "IA3"}}, weights="adapter_model.safetensors")
    assert "is a IA3 adapter; LoRA is needed" in refused(name="m", adapter="ia3")
    written("empty", {"adapter_config.json": LORA}, weights="")
    assert "empty has no weights" in refused(name="m", adapter="empty")
    written("lora", {"adapter_config.json": LORA}, weights="adapter_model.safetensors")
    said = refused({"r": 8}, name="m", adapter="lora")
    assert "lora.r is 8 (run.yaml" in said and "lora has 4; make them equal, or take lora.r out" in said
    assert "lora.use_dora is True (run.yaml" in refused({"use_dora": True}, name="m", adapter="lora")
    assert "has False" in refused({"use_rslora": True, "alpha": 8}, name="m", adapter="lora")
    written("dora", {"adapter_config.json": LORA | {"use_dora": True}}, weights="adapter_model.safetensors")
    assert "lora.use_dora is False" in refused({"use_dora": False}, name="m", adapter="dora")
    assert base({"use_dora": True, "r": 4}, name="m", adapter="dora").adapter, "the control"
    written(
        "pissa", {"adapter_config.json": LORA | {"init_lora_weights": "pissa"}}, weights="adapter_model.safetensors"
    )
    assert "begun as pissa, which changes the base, too" in refused(name="m", adapter="pissa")
    assert base({"r": 4, "alpha": 8, "dropout": 0.3}, name="m", adapter="lora").adapter == str(Path("lora").resolve())


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused() -> None:
    written("m", {"config.json": CONFIG})
    base(name="m").require_ids(100, "t")
    with pytest.raises(InputError, match="t has ids up to 100, and the model 100 rows"):
        base(name="m").require_ids(101, "t")
