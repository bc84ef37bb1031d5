"""Weights are made visible: written beside, reopened and checked tensor by tensor, named by their digest, renamed.

masters ─ .best_adapter.building/ ─ every tensor as it should be? ─ source.json ─ best_adapter/
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from phased_cpt.errors import PhasedCptError
from phased_cpt.model.adapter import base_of
from phased_cpt.model.tensor_file import TensorFile
from phased_cpt.published import FOLDERS, MARKER, Source
from phased_cpt.run_dir import copied, publish_file, sync_folder
from phased_cpt.sealed import MANIFEST
from phased_cpt.train.masters import bit_sum, masters_of, shape_of, trained

BUILDING = ".published.building"
ADAPTER_FILE, MODEL_FILE = "adapter_model.safetensors", "model.safetensors"


def write_weights(
    model: nn.Module,
    folder: Path,
    *,
    writes: bool,
    masters: Iterable[tuple[str, nn.Parameter, Tensor]] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """The trained weights as plain PEFT or transformers reads them, in fp32: nothing is rounded between phases.

    Collective; one rank writes, and holds a few tensors at a time. Returns the sha256 of the file of weights.
    """
    weights = dict(trained(model))
    names = saved_names(model, list(weights))
    others = {} if isinstance(model, PeftModel) else _buffers(base_of(model))
    path, file = folder / (ADAPTER_FILE if isinstance(model, PeftModel) else MODEL_FILE), None
    if writes:
        _write_configs(model, folder)
        shapes = {names[name]: (torch.float32, shape_of(weight)) for name, weight in weights.items()}
        file = TensorFile(path, shapes | {name: (each.dtype, each.shape) for name, each in others.items()}, beat)
    for name, _, master in masters_of(model) if masters is None else masters:
        if file:
            file.add(names[name], master)
    if not file:
        return {}
    for name, each in others.items():
        file.add(name, each)
    digest = file.close()
    for written in folder.iterdir():
        written.chmod(0o666 & ~_umask())  # PEFT writes for its owner alone
    return {path.name: digest}


def _write_configs(model: nn.Module, folder: Path) -> None:
    """All that a reader wants besides the weights."""
    base = base_of(model)
    if isinstance(model, PeftModel):
        config = model.peft_config[model.active_adapter]
        before, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = before
        base.config.save_pretrained(str(folder))
        return
    base.save_pretrained(str(folder), state_dict={}, save_original_format=False)  # and the code of a model of its own
    precision, base.config.dtype = base.config.dtype, torch.float32  # which save_pretrained takes from the model
    base.config.save_pretrained(str(folder))
    base.config.dtype = precision


def _buffers(base: nn.Module) -> dict[str, Tensor]:
    """What is saved of a model besides its weights; not second names of those."""
    weights = dict(base.named_parameters(remove_duplicate=False))
    return {name: each for name, each in base.state_dict().items() if name not in weights}


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def require_sound(folder: Path, expected: Mapping[str, tuple[int, ...]], first: Mapping[str, int]) -> None:
    """What is on disk is what was trained: every name and shape, nothing empty, nothing infinite, all of it learnt."""
    wrong, found, still = [], set(), []
    for name, tensor in _tensors(folder):
        found.add(name)
        if name not in expected:
            wrong.append(f"{name} was not expected")
        elif tuple(tensor.shape) != expected[name]:
            wrong.append(f"{name} is {list(tensor.shape)}, not {list(expected[name])}")
        elif not tensor.numel():
            wrong.append(f"{name} is empty")
        elif not torch.isfinite(tensor).all():
            wrong.append(f"{name} is not finite")
        elif name in first and bit_sum(tensor) == first[name]:
            still.append(name)
    wrong += [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} has not changed" for name in still if name not in _resting(still, expected)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PhasedCptError(f"{folder}: not published: {'; '.join(wrong[:3])}{more}")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """One at a time: of a model that is trained whole, all of them would not fit beside it."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_tensor(name)


def _resting(still: Sequence[str], expected: Iterable[str]) -> set[str]:
    """What need not have changed: experts that no token was routed to, and, after one step, the A of a fresh adapter.

    With B = 0 the gradient of every A is zero, and without weight decay all of them stay what they were drawn as.
    """
    a = {name for name in expected if ".lora_A." in name}
    return {name for name in still if re.search(r"\bexperts?\b", name)} | (a if a <= set(still) else set())


def saved_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The name on disk of each trained weight."""
    if not isinstance(model, PeftModel):
        return {name: name for name in names}
    places = {name: torch.tensor(at) for at, name in enumerate(names)}
    saved = get_peft_model_state_dict(model, state_dict=places, save_embedding_layers=False)
    return {names[int(at)]: name for name, at in saved.items()}


def staged(phase_folder: Path, slot: Path | None) -> Path:
    """Where what is published is put together; a slot of sealed weights stays as it is."""
    beside = phase_folder / BUILDING
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for path in slot.iterdir() if slot else []:
        if path.name != MANIFEST:
            copied(path, beside / path.name)
    return beside


def publish(written: Path, phase_folder: Path, source: Source) -> Path:
    """The marker, and then the name; what an earlier attempt may have left there gives way."""
    (written / MARKER).write_text(source.text())
    for path in written.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(written)
    for name in FOLDERS.values():
        if (phase_folder / name).exists():
            shutil.rmtree(phase_folder / name)
    target = phase_folder / FOLDERS[source.kind]
    os.replace(written, target)
    sync_folder(phase_folder)
    return target


def eval_final(phase_folder: Path, facts: dict[str, Any]) -> None:
    """What the published weights lose on the held-out documents."""
    publish_file(phase_folder / "eval_final.json", (json.dumps(facts, indent=2) + "\n").encode())
