"""One process that loads torch and transformers, and answers in a line of JSON.

{"model": a folder or a shape, "attention", "precision", "max_tokens", …} ─ python -m phased_cpt.probe ─→ {"torch", …}
"""

import json
import sys
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.training_args import OptimizerNames

from phased_cpt.model.base import attentions
from phased_cpt.model.quiet import quiet


def answered(question: dict[str, Any]) -> dict[str, Any]:
    """What torch sees of GPUs, and what a model without weights tells of itself."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, **_devices()}
    found["optimizers"] = [each.value for each in OptimizerNames]
    return (
        found | {"linears": None, "kernel": None, "refused": None} | (_shape_of(question) if question["model"] else {})
    )


def _devices() -> dict[str, Any]:
    """Each GPU with a sum computed on it: a kernel that is missing for it is an error there, and nowhere before."""
    why = None
    if torch.version.cuda and not torch.cuda.is_available():
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            why = str(error).splitlines()[0]
    return {"no_cuda": why, "devices": [_device(at) for at in range(torch.cuda.device_count())]}


def _device(at: int) -> dict[str, Any]:
    properties, error = torch.cuda.get_device_properties(at), None
    try:
        torch.ones(2, device=f"cuda:{at}").sum().item()
    except RuntimeError as refused:
        error = str(refused).splitlines()[0]
    capability = [properties.major, properties.minor]
    return {"name": properties.name, "capability": capability, "bytes": properties.total_memory, "error": error}


def _shape_of(question: dict[str, Any]) -> dict[str, Any]:
    """The linear layers of the base but the head, and the first attention kernel that it can be made with."""
    refused = None
    try:
        for kernel in attentions(question["attention"], question["precision"], question["max_tokens"]):
            try:
                model = _empty(question, kernel)
            except (ValueError, ImportError) as error:
                if "attention" not in str(error).lower() and "attn" not in str(error).lower():
                    raise
                refused = refused or str(error).splitlines()[0]
            else:
                return {"linears": _linears(model), "kernel": kernel, "refused": refused}
        model = _empty(question, "eager")
        return {"linears": _linears(model), "kernel": None, "refused": refused}
    except Exception as error:  # each architecture has its own ways
        return {"refused": " ".join(str(error).split())[:300]}


def _empty(question: dict[str, Any], kernel: str) -> nn.Module:
    """On the meta device, where a model has shapes and no numbers."""
    given, options = question["model"], {"trust_remote_code": question["trust_remote_code"]}
    if isinstance(given, dict):
        shape = dict(given)
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    else:
        config = AutoConfig.from_pretrained(given, local_files_only=True, **options)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=kernel, **options)  # type: ignore[no-untyped-call]
    return model


def _linears(model: nn.Module) -> list[str]:
    """By the last part of their names, which target_modules compares."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = (name for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D) and each is not head)
    return sorted({name.rpartition(".")[2] for name in found})


if __name__ == "__main__":
    quiet()
    sys.stdout.write(json.dumps(answered(json.load(sys.stdin))) + "\n")
