"""What a phase starts from, where that is not simply what the one before has published: its adapters, merged.

base + adapter of phase 1 ─ handover: merge ─→ phase1_foundation/merged_base ─→ phase 2 begins a fresh adapter on it
                                               gone when phase 2 has handed over its own; made anew where it is wanted

The chain stays in the precision that the phases compute in, after QLoRA too: what was merged is quantised anew when it
is loaded, so that no phase inherits the rounding to 4 bits of the one before.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from phased_cpt.bases import Base
from phased_cpt.errors import PhasedCptError
from phased_cpt.ledger import PhaseRecord, Weights
from phased_cpt.merged_folder import is_whole, read_marker
from phased_cpt.merging import job_of_run, merge
from phased_cpt.plan import Plan
from phased_cpt.published import require_published, weights_digest
from phased_cpt.run_dir import MERGED_BASE
from phased_cpt.sealed import remove

SHARD_BYTES = 2_000_000_000


def merged_base(plan: Plan, root: Path, base: Base, phase: PhaseRecord, records: Sequence[PhaseRecord]) -> Weights:
    """What a phase has published, as whole weights: made now, unless they are there."""
    assert phase.published is not None
    require_base(plan, root, base, phase.published, records)
    require_published(root, phase.published)
    folder = f"{phase.folder}/{MERGED_BASE}"
    job = job_of_run(plan, root, base, phase, root / folder)
    # No key of the user's but the precision: made once more, it must be the same bytes.
    job = replace(job, dtype=plan.config.model.precision, max_shard_size=SHARD_BYTES, four_bits=None, held_out=None)
    made = merge(job)
    return Weights(kind="base", base=weights_digest(made.folder), folder=folder)


def require_base(plan: Plan, root: Path, base: Base, weights: Weights, records: Sequence[PhaseRecord]) -> bool:
    """A merged base that weights stand on is there, if need be made once more. Returns whether it was."""
    facts = read_marker(root / weights.folder)
    if Path(weights.folder).name != MERGED_BASE or (facts is not None and is_whole(root / weights.folder, facts)):
        return False
    maker = next((each for each in records if each.handed_over and each.handed_over.folder == weights.folder), None)
    if maker is None or maker.published is None:
        raise PhasedCptError(f"{root / weights.folder} is gone, and nothing says how it was made; restore it")
    made = merged_base(plan, root, base, maker, records)
    if made.base != weights.base:
        remove(root / weights.folder)
        what = "made once more, it is not what it was (another version of the libraries, it may be)"
        raise PhasedCptError(f"{root / weights.folder}: {what}; `--redo-from` the phase after {maker.name}")
    return True


def clear_superseded(root: Path, records: Sequence[PhaseRecord], newest: PhaseRecord) -> None:
    """The merged bases of the phases before: of a large model each is as large as the model."""
    for each in records:
        if each.name == newest.name:
            return
        remove(root / each.folder / MERGED_BASE)
