"""What a run has added to its base, up to a phase: all of it, through every handover.

base ─ foundation ─ merge ─→ merged_base ─ evolution     evolution = base + adapter of foundation + its own
base ─ foundation ─ stack ─ evolution                    evolution = base + adapter of foundation + its own
base ─ foundation, every weight ─ evolution              evolution = base moved to best_model     + its own
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phased_cpt.errors import InputError
from phased_cpt.ledger import Adapter, PhaseRecord, Weights

# What an adapter may have besides factors: half of it is not half of the change.
WHOLE = ("modules_to_save", "trainable_token_indices")


@dataclass(frozen=True)
class Chain:
    """A change of the first base: whole weights in its place, if there are any, and adapters on top."""

    adapters: tuple[Adapter, ...]
    folder: str = ""  # of the whole weights, in the run folder
    digest: str = ""
    through_merges: bool = False  # a merged base lay between them, which was rounded as it was written


def chain_of(root: Path, weights: Weights, records: Sequence[PhaseRecord]) -> Chain:
    """The change that these weights are, seen from the base of the run."""
    if not weights.folder:
        return Chain(weights.adapters)
    maker = next((each for each in records if each.handed_over and each.handed_over.folder == weights.folder), None)
    if maker is not None and maker.published is not None:
        below = chain_of(root, maker.published, records)
        if all(_curve(root / each.folder) is None for each in below.adapters):
            return Chain((*below.adapters, *weights.adapters), below.folder, below.digest, through_merges=True)
    return Chain(weights.adapters, weights.folder, weights.base)


def require_straight(folders: Sequence[Path]) -> None:
    """A part of an adapter is a part of what it changes."""
    for folder in folders:
        if curve := _curve(folder):
            mend = "merge it (`phased-cpt merge`), and mix whole models"
            raise InputError(f"{folder}: {curve}, so that a part of it is not a part of what it changes; {mend}")


def _curve(folder: Path) -> str | None:
    """Why an adapter is not factors alone; None where it is."""
    try:
        config = dict(json.loads((folder / "adapter_config.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: its adapter_config.json cannot be read: {error}") from None
    if config.get("use_dora"):
        return "it is DoRA, which divides by lengths that it changes"
    whole = [f"it has {key}" for key in WHOLE if config.get(key)]
    return whole[0] if whole else "it has biases" if config.get("bias", "none") != "none" else None
