"""Criterion E: what a run that was disturbed must have in common with one that never was. Nothing is nearly equal.

E1 every byte of every published weight      E2 loss, rate, gradient of each step, each step once, replays like the first
E4 the optimizer, where checkpoints are kept  E5 the count of steps     E6 the tree, no lock held, nothing half-made
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from phased_cpt.ledger import read_record, require_no_ranks, run_lock
from phased_cpt.run_dir import RunDir
from tests.journeys.runs import OF_THE_CLOCK, all_of

# What an attempt leaves of itself in logs/, and the next one takes away.
OF_AN_ATTEMPT = ("pulse-", "stacks-", "failed-")


def everything(run: Path) -> dict[str, Any]:
    """All that counts of a run, and the proof that nobody is at work in it."""
    with run_lock(RunDir(run)):
        require_no_ranks(RunDir(run))
    require_replays(run)
    found = all_of(run)
    found["tree"] = [path for path in found["tree"] if not Path(path).name.startswith(OF_AN_ATTEMPT)]
    record = read_record(RunDir(run))
    assert record is not None
    return found | {
        "final_model": {path.name: sha256(path) for path in sorted(run.glob("final_model/*.safetensors"))},
        "sources": {path.parent.parent.name: _source(path) for path in sorted(run.glob("*/best_*/source.json"))},
        "moments": {str(path.relative_to(run)): sha256(path) for path in sorted(run.glob("*/checkpoints/*/optimizer*"))},
        "record": [(phase.state, phase.fingerprint, phase.published) for phase in record.phases],
        "half-made": sorted(str(path.relative_to(run)) for path in run.rglob(".*")),
    }  # fmt: skip


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Which parts of E do not hold."""
    return [part for part in wanted if found.get(part) != wanted[part]]


def require_equal(found: dict[str, Any], wanted: dict[str, Any], when: str) -> None:
    for part in apart(found, wanted):
        assert found[part] == wanted[part], f"{when}: {part}"


def require_replays(run: Path) -> None:
    """E2: a step that was done again had the same figures as the first time, to the last digit."""
    for logs in run.glob("phase*/logs"):
        kept = {name: _figures(logs / f"{name}.jsonl") for name in ("train", "eval")}
        for path in logs.glob("replayed-*.jsonl"):
            for line in path.read_text().splitlines():
                first = _timeless(json.loads(line))
                now = kept["eval" if "eval_loss" in first else "train"]
                assert now.get(_place(first), first) == first, f"{path}: {first}"


def _figures(path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {_place(line): line for line in map(_timeless, map(json.loads, filter(_is_whole, lines)))}


def _place(line: dict[str, Any]) -> tuple[int, str]:
    return line["step"], line.get("dataset", "")


def _is_whole(line: str) -> bool:
    return line.endswith("}")


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in OF_THE_CLOCK}


def _source(path: Path) -> dict[str, Any]:
    source: dict[str, Any] = json.loads(path.read_text())
    return source | {"seconds": 0, "row_seconds": 0, "row_before_seconds": 0}


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder, by its bytes."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
