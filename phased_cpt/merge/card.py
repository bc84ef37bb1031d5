"""What stands beside the weights: configuration, tokenizer, and a card that says where they come from."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from phased_cpt.merged_folder import TOKENIZER_FILES
from phased_cpt.merging import MergeJob
from phased_cpt.run_dir import publish_file


def write_configs(job: MergeJob, folder: Path, dtype: torch.dtype, untied: bool) -> None:
    """config.json of the base, but for what is different now; generation_config.json; the tokenizer; own code."""
    base = Path(job.base)
    config = json.loads((base / "config.json").read_bytes())
    name = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part |= {key: name for key in ("dtype", "torch_dtype") if key in part}
            part |= {"use_cache": True} if "use_cache" in part else {}
            part |= {"tie_word_embeddings": False} if untied and "tie_word_embeddings" in part else {}
    if untied:
        config["tie_word_embeddings"] = False
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = name
    _publish(folder / "config.json", config)
    tokenizer = Path(job.tokenizer) if job.tokenizer else base
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    for code in base.glob("*.py"):
        shutil.copyfile(code, folder / code.name)
    _publish(folder / "generation_config.json", _generation(base, config, tokenizer))


def _generation(base: Path, config: dict[str, Any], tokenizer: Path) -> dict[str, Any]:
    """Of the base; and answers end where documents did in training."""
    try:
        found = dict(json.loads((base / "generation_config.json").read_bytes()))
    except (OSError, ValueError):
        found = {"_from_model_config": True}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if found.get(key) is None and config.get(key) is not None:
            found[key] = config[key]
    end = _end_of(tokenizer)
    ends = found.get("eos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end is not None and end not in known:
        found["eos_token_id"] = [end, *known] if known and not found.get("_from_model_config") else end
    return found


def _end_of(tokenizer: Path) -> int | None:
    """The id of the token that ends a document."""
    try:
        token = json.loads((tokenizer / "tokenizer_config.json").read_bytes()).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        words = json.loads((tokenizer / "tokenizer.json").read_bytes())
    except (OSError, ValueError, AttributeError):
        return None
    added = {each["content"]: each["id"] for each in words.get("added_tokens", [])}
    return added.get(token, words.get("model", {}).get("vocab", {}).get(token) if token else None)


def write_card(job: MergeJob, folder: Path, facts: dict[str, Any]) -> None:
    """README.md, as the hub shows it."""
    lineage = job.lineage
    name = lineage.get("base", job.base)
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- phased-cpt"]
    if "/" in str(name) and not str(name).startswith((".", "/", "~")):
        head.append(f"base_model: {name}")
    lines = [*head, "---", "", f"# {lineage.get('run', Path(job.output).name)}", ""]
    lines += [f"Base: `{name}`" + (f", commit `{lineage['commit']}`" if lineage.get("commit") else "") + ".", ""]
    if lineage.get("phases"):
        lines += ["What it was taught, in this order:", "", *_table(lineage["phases"]), ""]
    lines += ["How it was merged:", ""]
    lines += [f"- {each}" for each in told(facts)]
    lines += ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("this/folder")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("this/folder")', "```", ""]
    publish_file(folder / "README.md", "\n".join(lines).encode())


def told(facts: dict[str, Any]) -> list[str]:
    """The checks of a merge, a sentence each."""
    lines = [f"{facts['numbers'] / 1e6:,.1f} million weights in {facts['dtype']}, {facts['merged']} layers merged"]
    if facts["untied"]:
        lines.append("input and output embeddings were one in the base, and are two here: an adapter changed one alone")
    lines += _strengths(facts)
    if chosen := facts.get("base_choice"):
        lines.append(f"base: {chosen['kind']}, because {chosen['why']}" + _measured(chosen))
    if facts["merged"]:
        lines.append(f"each merged layer against PEFT's own: {facts['layer_off']:.1e} relative at most")
    logits = facts["logits"]
    against = f"logits against base and adapter on {logits['tokens']} tokens of {logits['of']}"
    if logits["exact"]:
        lines.append(f"{against}: {logits['relative']:.1e} relative at most")
    else:
        share = f"{logits['agreed']} of {logits['clear']} clear positions have the same first token"
        lines.append(f"{against}: {share}; the mean difference is {logits['spread']:.2%} of their spread")
    return lines


def _strengths(facts: dict[str, Any]) -> list[str]:
    """What is in it, where it is not all of what was published."""
    moved = [facts["toward"]] if facts.get("toward") else []
    parts = [*moved, *facts["adapters"]]
    if all(each["scale"] == 1 for each in parts):
        return []
    return ["base" + "".join(f" + {each['scale']:g} × {'/'.join(Path(each['folder']).parts[-2:])}" for each in parts)]


def _measured(chosen: dict[str, Any]) -> str:
    said = ""
    if losses := chosen.get("held_out_loss"):
        said += " (" + ", ".join(f"{kind} {loss:.4f}" for kind, loss in losses.items()) + " nats)"
    if ratio := chosen.get("residual_to_delta"):
        said += f"; what 4 bits took is {ratio['median']:.2g} times what the adapter gave (median of layers)"
    return said


def _table(phases: list[dict[str, Any]]) -> list[str]:
    rows = ["| | phase | what | steps | tokens | perplexity before | after |", "|---|---|---|---|---|---|---|"]
    for number, phase in enumerate(phases, 1):
        before, after = (_figure(phase[side].get("perplexity")) for side in ("start", "end"))
        what = " ".join(str(phase.get("description", "")).split()).replace("|", "\\|")
        steps, tokens = f"{phase['step']} of {phase['steps']}", f"{phase['tokens']:,}"
        rows.append(f"| {number} | {phase['phase']} | {what} | {steps} | {tokens} | {before} | {after} |")
    return rows


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def _publish(path: Path, values: dict[str, Any]) -> None:
    publish_file(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
