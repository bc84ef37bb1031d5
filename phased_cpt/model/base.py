"""The base model of a phase: from a folder, in the precision and with the attention that the plan says.

A base of random weights is a folder, too, made once by one process: so it is the same for any number of ranks, under
any ZeRO stage, and for whoever looks at the run later.
"""

import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from phased_cpt.bases import random_digest
from phased_cpt.errors import InputError
from phased_cpt.published import MARKER, weights_digest
from phased_cpt.run_dir import sync_folder

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "uint8": torch.uint8}
LONG_ROWS = 8192  # tokens; sdpa's mask for packed documents is dense: 1 GiB a row at 32K

Tell = Callable[[str], object]


def load_base(
    folder: Path,
    *,
    precision: str,
    attention: str,
    max_tokens: int,
    storage: str | None,
    trust_remote_code: bool,
    tell: Tell,
    **more: Any,
) -> PreTrainedModel:
    """The frozen or trainable base; `storage` is the type that 4-bit weights are kept in, None without them."""
    options: dict[str, Any] = {
        "output_loading_info": True,
        "dtype": TYPES[precision],
        "trust_remote_code": trust_remote_code,
        "local_files_only": True,
    }
    if storage is not None:
        options["quantization_config"] = four_bits(precision, storage)
        if not is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]  # which refuses a device map, and shards what is loaded whole
            options["device_map"] = {"": this_device()}
    refused: ValueError | ImportError | None = None
    for kernel in attentions(attention, precision, max_tokens):
        try:
            found: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel, **options | more)
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if "Cannot allocate memory" in str(error):
                raise MemoryError(str(error)) from None
            raise InputError(f"{folder}: this model cannot be loaded: {error}") from None
        except (ValueError, ImportError) as error:
            if "attention" not in str(error).lower() and "attn" not in str(error).lower():
                raise InputError(f"{folder}: this model cannot be loaded: {error}") from None
            refused = refused or error
            continue
        model: PreTrainedModel = found[0]
        if missing := sorted(found[1]["missing_keys"]):  # transformers draws them at random, and only warns
            what = f"{missing[0]}" + (f" and {len(missing) - 1} more are" if len(missing) > 1 else " is")
            raise InputError(f"{folder}: this model cannot be loaded: {what} missing from its weights")
        if refused and attention == "auto":
            tell(f"attention: {kernel}, because {str(refused).splitlines()[0]}")
        model.config.use_cache = False  # with a cache, packed documents see each other
        return model
    raise InputError(f"model.attention: {attention} cannot be used with this model: {refused}; `auto` takes another")


def attentions(asked: str, precision: str, max_tokens: int) -> Iterator[str]:
    """What is tried, the fastest that keeps packed documents apart first."""
    if asked != "auto":
        yield asked
        return
    if torch.cuda.is_available():
        if precision != "fp32":
            yield from ("flash_attention_3",) if importlib.util.find_spec("flash_attn_interface") else ()
            yield from ("flash_attention_2",) if importlib.util.find_spec("flash_attn") else ()
        if max_tokens > LONG_ROWS:
            yield "flex_attention"  # not on a CPU, where it has no backward
    yield from ("sdpa", "eager")


def four_bits(precision: str, storage: str) -> BitsAndBytesConfig:
    """nf4 with double quantisation; stored in the type of the weights, as ZeRO-3 can only shard one type."""
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=TYPES[precision],
        bnb_4bit_quant_storage=TYPES[precision if storage == "auto" else storage],
    )


def this_device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def head_of(model: PreTrainedModel) -> torch.nn.Module | None:
    """What makes logits of hidden states."""
    head: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def make_random_base(folder: Path, shape: dict[str, Any], seed: int) -> None:
    """Random weights of an architecture, as a folder like any other: whole, or not there."""
    if folder.exists():
        return
    known_as = random_digest(shape, seed)
    shape = dict(shape)
    if "model_type" not in shape:
        raise InputError("model.from_config: model_type is missing (llama, qwen3, …)")
    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    except Exception as error:  # each architecture has its own ways
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model.from_config: no model can be made of it: {reason}") from None
    beside = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(beside, ignore_errors=True)  # half of one
    try:
        model.save_pretrained(beside)
    except SafetensorError as error:
        if "os error 28" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(beside)) from None
    for path in beside.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
    (beside / MARKER).write_text(json.dumps({"digest": weights_digest(beside), "base": known_as}))
    os.replace(beside, folder)
    sync_folder(folder.parent)
