"""What two runs must have in common for one to be the other: the criterion E of docs/fault_matrix.md, atol = 0."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.journeys.conftest import lines

# What an attempt measures of its own time.
OF_THE_CLOCK = ("ts", "tokens_per_second", "eta_seconds", "curriculum_eta_seconds", "mfu", "hfu", "memory_bytes")


def all_of(run: Path) -> dict[str, Any]:
    """Every published byte, every line of every step once, and the tree: of a finished run."""
    return {
        "weights": {
            str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(run.glob("*/best_*/*.safetensors"))
        },
        "steps": {path.parent.parent.name: timeless(path) for path in sorted(run.glob("*/logs/train.jsonl"))},
        "evaluations": {path.parent.parent.name: timeless(path) for path in sorted(run.glob("*/logs/eval.jsonl"))},
        "final": {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("*/eval_final.json"))},
        "tree": tree(run),
    }


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in lines(path)]


def tree(run: Path) -> list[str]:
    """All files but those that an attempt leaves of itself."""
    paths = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return sorted(
        str(path) for path in paths if "tfevents" not in path.name and not path.name.startswith(("replayed-", "rank"))
    )
