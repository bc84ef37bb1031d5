"""What a phase hands on: a folder of weights that says of itself what it is, and is believed only when its bytes agree.

best_adapter/   adapter_model.safetensors   adapter_config.json   tokenizer   source.json, the marker: step, why, digest
best_model/     the same of a phase that trained every weight
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phased_cpt.data.cache import file_digests, sha256_of
from phased_cpt.errors import PhasedCptError
from phased_cpt.ledger import Adapter, Weights
from phased_cpt.ledger.fingerprint import digest_of

MARKER = "source.json"
MERGED_MARKER = "merge.json"
FOLDERS = {"adapter": "best_adapter", "base": "best_model"}
# What adapter_config.json says of places and of the program that wrote it, and not of the adapter.
NOT_MEANT = ("base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version", "task_type")


@dataclass(frozen=True)
class Source:
    """Where published weights come from."""

    phase: str
    fingerprint: str
    kind: str
    digest: str
    step: int
    steps: int
    why: str
    tokens: int
    seconds: float
    base: str = ""  # digest of the base that an adapter is on,
    commit: str | None = None  # of the hub, if it came from there: the digest is then that of the hub's cache,
    four_bits: dict[str, str] | None = None  # and how training kept it
    start: dict[str, Any] = field(default_factory=dict)  # the held-out figures before step 0, if there are any
    end: dict[str, Any] = field(default_factory=dict)  # and those of what is published
    row_before: dict[str, Any] = field(default_factory=dict)  # of every set before phase 1: the base
    row: dict[str, Any] = field(default_factory=dict)  # of every set, of what is published
    row_before_seconds: float = 0.0
    row_seconds: float = 0.0
    gate: dict[str, Any] | None = None

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def weights_digest(folder: Path, memory: Path | None = None) -> str:
    """Of the bytes of the weights and of what gives them their meaning; `memory` remembers what was hashed."""
    files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    if not files:
        raise PhasedCptError(f"{folder}: no weights in it (*.safetensors)")
    digests = file_digests(files, memory) if memory else [*ThreadPoolExecutor(os.cpu_count()).map(sha256_of, files)]
    return digest_of([_meaning(folder), {path.name: each for path, each in zip(files, digests, strict=True)}])


def _meaning(folder: Path) -> dict[str, Any]:
    path = next((p for p in (folder / "adapter_config.json", folder / "config.json") if p.exists()), None)
    if path is None:
        raise PhasedCptError(f"{folder}: weights without a config.json; nobody can tell what they mean")
    try:
        config = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        raise PhasedCptError(f"{path}: damaged; no model can be read by it") from None
    config = {key: value for key, value in config.items() if key not in NOT_MEANT and value is not None}
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set, in any order
    return config


def read_source(phase_folder: Path) -> tuple[Path, Source] | None:
    """What a phase has published, if it has."""
    folders = (phase_folder / name for name in FOLDERS.values())
    return next(((folder, source) for folder in folders if (source := source_of(folder))), None)


def source_of(folder: Path) -> Source | None:
    """What published weights say of themselves; None of a folder that says nothing."""
    try:
        return Source(**json.loads((folder / MARKER).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError):
        raise PhasedCptError(f"{folder / MARKER}: damaged; train the phase again") from None


def published_weights(
    root: Path, phase_folder: str, fingerprint: str, start: Weights, below: tuple[Adapter, ...] = ()
) -> Weights | None:
    """What the phase of this fingerprint has published, reopened and hashed; None if it has not.

    `below` its own adapter are those of its start that it has left as they were.
    """
    found = read_source(root / phase_folder)
    if found is None or found[1].fingerprint != fingerprint:
        return None
    folder, source = found
    digest = weights_digest(folder)
    if digest != source.digest:
        raise PhasedCptError(_other_bytes(folder, source.phase))
    place = str(folder.relative_to(root))
    if source.kind == "base":
        return Weights(kind="base", base=digest, folder=place)
    adapters = (*below, Adapter(digest=digest, folder=place))
    return Weights(kind="adapter", base=start.base, folder=start.folder, adapters=adapters)


def require_published(root: Path, weights: Weights) -> None:
    """What a phase starts from is what was published, to the byte; what came from outside is held by its digest."""
    places = [(weights.folder, weights.base), *((each.folder, each.digest) for each in weights.adapters)]
    for place, digest in places:
        if place and weights_digest(root / place) != digest:
            found = read_source((root / place).parent)
            raise PhasedCptError(_other_bytes(root / place, found[1].phase if found else "PHASE"))


def _other_bytes(folder: Path, phase: str) -> str:
    mend = f"restore it, or train the phase again with `--redo-from {phase}`"
    return f"{folder}: the weights are not what was published; {mend}"
