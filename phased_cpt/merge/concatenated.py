"""Several adapters as one, exactly: their factors side by side. The mean of the factors would be another thing.

A = A₁ over A₂     B = s₁w₁·B₁ beside s₂w₂·B₂     B·A = w₁·s₁·B₁·A₁ + w₂·s₂·B₂·A₂      rank r₁ + r₂, scale 1
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import Tensor, nn

from phased_cpt.errors import InputError
from phased_cpt.merge.adapters import TOP, Adapted, Given
from phased_cpt.merge.story import empty_model_of
from phased_cpt.merged_folder import TOKENIZER_FILES
from phased_cpt.merging import MergeJob
from phased_cpt.published import MARKER, Source, weights_digest
from phased_cpt.run_dir import publish_file, sync_folder

WEIGHTS = "adapter_model.safetensors"


def concatenated(job: MergeJob) -> dict[str, Any]:
    """The adapters of a job as one, in the folder where the job goes: any PEFT loads it."""
    output = Path(job.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: there is something already; name another folder with --out")
    adapted = Adapted(empty_model_of(job), [Given(Path(each.folder), each.scale) for each in job.adapters])
    factors = {name: _factors(adapted, name, site) for name, site in adapted.sites.items()}
    if adapted.replaced or not factors:
        raise InputError(f"--adapter-only: an adapter has more than factors; {MEND}")
    building = output.with_name(f".{output.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    saved = {f"{TOP}{name}.lora_{side}.weight": each for name, pair in factors.items() for side, each in pair.items()}
    save_file(saved, building / WEIGHTS, {"format": "pt"})
    ranks = {name: len(pair["A"]) for name, pair in factors.items()}
    _write_config(job, adapted, ranks, building)
    for name in TOKENIZER_FILES:
        if job.tokenizer and (Path(job.tokenizer) / name).exists():
            shutil.copyfile(Path(job.tokenizer) / name, building / name)
    source = _source(job, building)
    publish_file(building / MARKER, source.text().encode())
    if output.exists():
        output.rmdir()
    os.replace(building, output)
    sync_folder(output.parent)
    return {"folder": str(output), "rank": max(ranks.values()), "made_of": source.why, "digest": source.digest}


MEND = "leave --adapter-only out: merged into the base, it is exact, too"


def _factors(adapted: Adapted, name: str, site: Any) -> dict[str, Tensor]:
    """Of one layer, those of every adapter that changes it."""
    if type(site) is not Linear or site.lora_variant or any(site.lora_bias.values()):
        raise InputError(f"--adapter-only: {name} is changed otherwise than by factors alone; {MEND}")
    mine = [each for each in adapted.names if each in site.lora_A]

    def read(side: str, adapter: str) -> Tensor:
        return adapted.reads[f"{TOP}{name}.lora_{side}.{adapter}.weight"](name).float()

    rows = torch.cat([read("A", each) for each in mine], 0)
    columns = torch.cat([read("B", each) * site.scaling[each] for each in mine], 1)
    return {"A": rows, "B": columns}


def _write_config(job: MergeJob, adapted: Adapted, ranks: dict[str, int], folder: Path) -> None:
    """As PEFT reads it: alpha = r is a scale of 1, and where layers differ they are named."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    own = {name: rank for name, rank in ranks.items() if rank != usual}
    written = [json.loads((Path(each.folder) / "adapter_config.json").read_bytes()) for each in job.adapters]
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        lora_dropout=0.0,
        rank_pattern=own,
        alpha_pattern=dict(own),
        target_modules=_targets(adapted.model, ranks),
        fan_in_fan_out=bool(written[0].get("fan_in_fan_out")),
        task_type="CAUSAL_LM",
        base_model_name_or_path=written[0].get("base_model_name_or_path") or job.base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))


def _targets(model: nn.Module, ranks: dict[str, int]) -> list[str]:
    """The short names, where they mean these layers and no others: other programs than PEFT know them, too."""
    short = sorted({name.rpartition(".")[2] for name in ranks})
    meant = {name for name, site in model.named_modules() if name.rpartition(".")[2] in short}
    return short if meant == set(ranks) else sorted(ranks)


def _source(job: MergeJob, folder: Path) -> Source:
    """What it stands on, so that whoever merges it or talks to it is told of another base."""
    made_of = " + ".join(f"{each.scale:g} × {'/'.join(Path(each.folder).parts[-2:])}" for each in job.adapters)
    return Source(
        phase="soup",
        fingerprint=job.digest,
        kind="adapter",
        digest=weights_digest(folder),
        step=0,
        steps=0,
        why=made_of,
        tokens=0,
        seconds=0.0,
        base=job.base_digest,
        commit=job.lineage.get("commit"),
        four_bits=asdict(job.four_bits) if job.four_bits else None,
    )
