"""Weights and adapters into memory: all of each, in the precision of the training, and as strong as is said."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.model.adapter import base_of
from phased_cpt.model.base import Tell, load_base

Model = PreTrainedModel | PeftModel
OF_A_GPU = ("flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class Whole:
    """A folder of whole weights, and how they are held."""

    folder: Path
    precision: str
    storage: str | None = None  # of 4-bit weights; None without them
    attention: str = "auto"
    max_tokens: int = 0  # of a row, by which `auto` chooses
    trust_remote_code: bool = False


def device_of(name: str | None) -> torch.device:
    """The one that was named, else the first GPU, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {name}: there is no such device; type cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"--device {name}: {count} GPUs are seen here; type cpu, or one that there is")
        return torch.device("cuda", device.index or 0)
    return device


def attention_on(asked: str, device: torch.device) -> str:
    """What the run was trained with, unless only a GPU has it, and this is a CPU."""
    if device.type != "cpu" or asked in ("sdpa", "eager"):
        return asked
    if asked in OF_A_GPU or torch.cuda.is_available():  # where `auto` would take one of these
        return "sdpa"
    return asked


def load_whole(whole: Whole, device: torch.device, tell: Tell) -> PreTrainedModel:
    try:
        with silently():
            model = load_base(
                whole.folder,
                precision=whole.precision,
                attention=whole.attention,
                max_tokens=whole.max_tokens,
                storage=whole.storage,
                trust_remote_code=whole.trust_remote_code,
                tell=tell,
                device_map={"": device},
            )
    except torch.OutOfMemoryError:
        raise PhasedCptError(f"{whole.folder}: {device} has no room for it; try --4bit, or --device cpu") from None
    model.config.use_cache = True  # as is wanted where text is made, and no documents stand side by side
    return model


def with_adapter(model: Model, folder: Path, inside: str, device: torch.device) -> PeftModel:
    """One more adapter beside those that are there, all of it: PEFT leaves what it does not find as it was drawn."""
    try:
        with silently():
            if not isinstance(model, PeftModel):
                config = LoraConfig.from_pretrained(str(folder))
                # In the precision of the base, as it is trained.
                model = PeftModel(model, config, inside, autocast_adapter_dtype=False)
            found = model.load_adapter(str(folder), inside, torch_device=str(device), autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: this adapter does not fit {base_of(model).name_or_path}: {reason}") from None
    wrong = [f"{key} is missing" for key in found.missing_keys if inside in key.split(".")]
    wrong += [f"{key} has no place" for key in found.unexpected_keys]
    if wrong:
        raise InputError(f"{folder}: this adapter does not fit {base_of(model).name_or_path}: {wrong[0]}")
    return model


@contextlib.contextmanager
def as_strong(model: PeftModel, names: list[str], strength: float) -> Iterator[None]:
    """Adapters that count for so much: by the factor before B·A, as both factors would make it the square."""
    layers = [layer.scaling for layer in model.modules() if isinstance(layer, LoraLayer)] if strength != 1.0 else []
    before = [dict(scaling) for scaling in layers]
    try:
        for scaling in layers:
            scaling |= {name: scaling[name] * strength for name in names if name in scaling}
        yield
    finally:
        for scaling, was in zip(layers, before, strict=True):
            scaling |= was


def keep_4bit_weights(model: torch.nn.Module) -> None:
    """On a CPU a forward in eval mode packs 4-bit weights anew, and what is unpacked later are other weights."""
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and type(module).__name__ == "Linear4bit":
            module.training = True


def tokenizer_of(whole: Whole, adapters: tuple[Path, ...]) -> PreTrainedTokenizerBase:
    """That of an adapter, if it has one; else that of its base."""
    has_one = (
        folder
        for folder in adapters[::-1]
        if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    )
    folder = next(has_one, whole.folder)
    try:
        with silently():
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=whole.trust_remote_code, local_files_only=True
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: no tokenizer can be read: {str(error).strip().splitlines()[0]}") from None
    return loaded


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """What the libraries say of themselves while they load does not help anybody."""
    logs = transformers.utils.logging
    before, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()  # type: ignore[no-untyped-call]
    logs.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logs.set_verbosity(before)
        if bars:
            logs.enable_progress_bar()  # type: ignore[no-untyped-call]
