"""The base of a plan, and the DeepSpeed file of a phase: what an estimate begins with."""

import contextlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from phased_cpt import deepspeed_file
from phased_cpt.bases import Base, find_base
from phased_cpt.data.files import is_hub_id
from phased_cpt.errors import InputError
from phased_cpt.estimate.architecture import UnknownShapeError, architecture_of
from phased_cpt.estimate.memory import estimate
from phased_cpt.estimate.recipe import Recipe, recipe_of
from phased_cpt.fitting.hardware import Hardware, hardware_here
from phased_cpt.plan import PhasePlan, Plan

NOWHERE = Path("/nonexistent")  # random weights that are there already would be hashed
PATIENCE_SECONDS = 10.0  # with the hub
TRANSPORT: type[Exception] = vars(hub_errors)["HTTPError"]  # of httpx, or httpx2, by release
FREE_FOR_THE_BASE = 0.6  # of a GPU's memory, where no more than the size of the files is known


def filled_file(phase: PhasePlan, base: Base, hardware: Hardware | None = None) -> dict[str, Any]:
    """The DeepSpeed file of a phase, with nothing left to be guessed."""
    hardware = hardware or hardware_here(phase.batch.ranks if phase.batch else 1)
    return filled_for(chosen_file(phase, base, hardware), phase, base, hardware)


def filled_for(name: str, phase: PhasePlan, base: Base, hardware: Hardware) -> dict[str, Any]:
    shape, on_gpu = deepspeed_file.ModelShape(hidden_size=base.hidden_size), hardware.gpu_bytes is not None
    return deepspeed_file.filled(deepspeed_file.read(name), phase, shape, name=name, on_gpu=on_gpu)


def chosen_file(phase: PhasePlan, base: Base, hardware: Hardware) -> str:
    """The name of the DeepSpeed file of a phase; of `auto`, the one that it stands for on this hardware."""
    name = phase.settings.training.deepspeed
    fits = None if name != deepspeed_file.AUTO else _fits_on_one_gpu(phase, base, hardware)
    tokens, use_4bit = phase.settings.data.max_tokens, phase.model.use_4bit
    return deepspeed_file.chosen(name, max_tokens=tokens, use_4bit=use_4bit, fits_on_one_gpu=fits)


def _fits_on_one_gpu(phase: PhasePlan, base: Base, hardware: Hardware) -> bool | None:
    """Whether a phase fits with its weights whole on each; None where nobody can tell, or there is no GPU."""
    if not hardware.gpu_bytes:
        return None
    try:
        model = architecture_of(config_of(base))
    except UnknownShapeError:
        return base.size_bytes < FREE_FOR_THE_BASE * hardware.gpu_bytes if base.size_bytes else None
    device, _ = estimate(model, recipe_for(phase, base, hardware, "zero2"))
    return device.peak <= hardware.room


def config_of(base: Base) -> dict[str, Any]:
    """The config.json of a base."""
    return base.shape if base.shape is not None else _read(Path(base.folder) / "config.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"model.name: {path.parent}: its config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"model.name: {path.parent}: its config.json holds no object")
    return config


def recipe_for(phase: PhasePlan, base: Base, hardware: Hardware, file: str) -> Recipe:
    return recipe_of(
        phase,
        filled_for(file, phase, base, hardware),
        config_of(base),
        ranks_of_a_node=hardware.ranks_of_a_node,
        on_gpu=hardware.gpu_bytes is not None,
    )


# The base -------------------------------------------------------------------------------------------------------------


def base_to_estimate(plan: Plan) -> Base:
    """The base of a plan, of which no more than its config.json is read: no weights are hashed or downloaded."""
    model = plan.config.model
    if model.from_config is not None:
        return find_base(plan, NOWHERE, NOWHERE)
    assert model.name is not None
    folder = Path(model.name).expanduser()
    if not folder.is_dir() and is_hub_id(model.name):
        folder = _config_of_the_hub(model.name, model.revision).parent
    if not (folder / "config.json").exists():
        what = "is no model (it has no config.json)" if folder.is_dir() else "no such folder, and no hub id"
        raise InputError(f"model.name: {model.name} {what}; nothing can be estimated of it")
    _read(folder / "config.json")
    return Base(str(folder), "")


def _config_of_the_hub(name: str, revision: str | None) -> Path:
    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=True))
    try:
        HfApi().model_info(name, revision=revision, timeout=PATIENCE_SECONDS)  # a download would try for half a minute
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.name: {name}: the hub does not give it: {reason} (HF_TOKEN for a gated one)") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, TRANSPORT, OSError):
        what = "its config.json is not here, and the hub cannot be reached"
        raise InputError(f"model.name: {name}: {what}; name a folder, or fetch it where there is a network") from None
