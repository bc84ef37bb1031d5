"""One contender of the merge benchmark, in a process of its own, as its users would call it.

    python benchmarks/merge_contenders.py NAME BASE ADAPTER FOLDER

The merged model is FOLDER/model; what the contender tells of itself, if anything, is FOLDER/told.json. Nothing is
imported before a contender is chosen: starting up is part of what it takes, and not every Python here has every one.
"""

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

SHARD = "2GB"


def ours(base: Path, adapter: Path, folder: Path) -> None:
    """What `phased-cpt merge --base … --adapter … --out …` does: hashes both, and has a child process merge them."""
    from phased_cpt.merging import merge_folders

    found = merge_folders(str(base), [adapter], folder / "model", [], print)
    (folder / "told.json").write_text(json.dumps(found.facts))


def peft(base: Path, adapter: Path, folder: Path) -> None:
    """The script of PEFT's own guide."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(folder / "model", max_shard_size=SHARD)


def axolotl(base: Path, adapter: Path, folder: Path) -> None:
    """`merge_method: memory_efficient`, its default, as axolotl/cli/merge_lora.py calls it (without reading a YAML)."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    merge_lora_sharded_efficient(
        base_model_path=str(base), lora_adapter_path=str(adapter), output_path=folder / "model", device="cpu"
    )


def mergekit(base: Path, adapter: Path, folder: Path) -> None:
    """`mergekit-yaml` on `base+adapter`: PEFT merges them into a cache, from which the output is written."""
    wanted = folder / "mergekit.yaml"
    model = {"model": f"{base}+{adapter}"}
    wanted.write_text(json.dumps({"merge_method": "passthrough", "dtype": "bfloat16", "models": [model]}))
    options = ["--lora-merge-cache", str(folder / "cache"), "--no-copy-tokenizer"]
    sys.argv = ["mergekit-yaml", str(wanted), str(folder / "model"), *options]
    runpy.run_module("mergekit.scripts.run_yaml", run_name="__main__")


CONTENDERS: dict[str, Callable[[Path, Path, Path], None]] = {
    "ours": ours,
    "peft": peft,
    "axolotl": axolotl,
    "mergekit": mergekit,
}

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    CONTENDERS[sys.argv[1]](*(Path(each) for each in sys.argv[2:]))
