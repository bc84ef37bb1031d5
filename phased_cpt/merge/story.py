"""The story of a merge.

the base's shape ─ adapters on it ─ which base? ─ files, one after the other ─ read back, walked, compared ─ published
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from phased_cpt.data.watch import Watcher
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.merge import shards as files
from phased_cpt.merge.adapters import Adapted, Given, Live
from phased_cpt.merge.card import told, write_card, write_configs
from phased_cpt.merge.check import Logits, Wrong, compared
from phased_cpt.merge.choice import WINDOWS, Choice, choose, tokens_that_fit
from phased_cpt.merge.empty import empty_model
from phased_cpt.merge.numbers import Base, Between
from phased_cpt.merge.pieces import Output, numbers_of, usual_dtype
from phased_cpt.merge.places import Places
from phased_cpt.merge.quantised import FourBits
from phased_cpt.merge.stored import Folder
from phased_cpt.merge.texts import LONGEST, Windows, held_out, own_text
from phased_cpt.merge.walk import walked
from phased_cpt.merged_folder import building_of, clear_left, empty, publish
from phased_cpt.merging import FORMAT, MergeJob
from phased_cpt.model.base import TYPES
from phased_cpt.published import MERGED_MARKER, weights_digest
from phased_cpt.run_dir import publish_file, require_room

PLAN, MODEL = "plan.json", "model"
CHECK_ROWS = 2
CPU_TOKENS = 16  # a row; the walk finds what is wired wrongly, and each layer has been asked on its own


@dataclass(frozen=True)
class Materials:
    """A base and what is on it, without a number of either."""

    job: MergeJob
    empty: PreTrainedModel
    places: Places
    folder: Folder
    adapted: Adapted
    dtype: torch.dtype
    device: torch.device
    other: Base | None = None  # what the base is moved towards

    def base(self, four_bits: FourBits | None = None) -> Base:
        if self.other is not None and self.job.toward is not None:
            how_far = self.other, self.job.toward.scale
            return Between(self.folder, self.places, self.adapted.replaced, *how_far)
        return Base(self.folder, self.places, self.adapted.replaced, four_bits)

    def output(self, four_bits: FourBits | None = None) -> Output:
        through = self.other.places.of if self.other else four_bits.names if four_bits else ()
        return Output(self.base(four_bits), self.adapted, self.dtype, through)


def merge(job: MergeJob, watcher: Watcher) -> dict[str, Any]:
    """The merged model of a job, checked and published; what is known of it."""
    try:
        return _merge(job, watcher)
    except Wrong:
        clear_left(Path(job.output))  # it would only come out wrong again
        raise


def _merge(job: MergeJob, watcher: Watcher) -> dict[str, Any]:
    began = time.monotonic()
    materials = _materials(job)
    four_bits = FourBits(empty_model_of(job), job.four_bits.precision, job.four_bits.storage) if job.four_bits else None
    folder = begun(job)
    windows = _windows(materials)
    choice = _chosen(materials, four_bits, windows, watcher.tell)
    output = materials.output(four_bits if choice and choice.kind == "dequantized" else None)
    shards = files.cut(output.pieces, job.max_shard_size)
    require_room(folder, sum(shard.bytes for shard in shards), "the files of the merged model")
    watcher.begin("merging", sum(shard.bytes for shard in shards))
    notes = files.write(output, shards, folder, looked_at=lambda: {"off": output.off}, advance=watcher.advance)
    watcher.end()
    wrote = time.monotonic() - began
    files.write_index(folder, shards)
    write_configs(job, folder, materials.dtype, bool(output.untied) or materials.places.differ)
    watcher.tell(f"written in {wrote:.0f} s; checked against base and adapter")
    logits = _checked(materials, output, folder, windows)
    facts = {
        "digest": job.digest,
        "format": FORMAT,
        "base": {"folder": job.base, "digest": job.base_digest},
        "adapters": [{"folder": each.folder, "digest": each.digest, "scale": each.scale} for each in job.adapters],
        "toward": asdict(job.toward) if job.toward else None,
        "dtype": str(materials.dtype).removeprefix("torch."),
        "numbers": numbers_of(materials.empty),
        "merged": len(materials.adapted.sites),
        "untied": output.untied,
        "layer_off": max([output.off, *(note["off"] for note in notes.values())]),
        "logits": logits.facts() | {"of": windows.of},
        "bytes": sum(shard.bytes for shard in shards),
        "seconds": {"written": round(wrote, 1), "all": round(time.monotonic() - began, 1)},
    }
    if choice:
        facts["base_choice"] = {"kind": choice.kind, "why": choice.why, **choice.facts}
    _publish(job, folder, facts, {name: note["sha256"] for name, note in notes.items()})
    for line in told(facts):
        watcher.tell(f"  {line}")
    return facts


def weights_of(folder: Path, *, trust_remote_code: bool) -> Base:
    """All numbers of a folder, none of them read yet."""
    files = Folder(folder)
    places = Places(empty_model(folder, trust_remote_code=trust_remote_code), files)
    places.require_all()
    return Base(files, places, {})


def empty_model_of(job: MergeJob) -> PreTrainedModel:
    return empty_model(Path(job.base), trust_remote_code=job.trust_remote_code)


def _materials(job: MergeJob) -> Materials:
    """All that can be refused is refused here, before anything is written."""
    empty = empty_model_of(job)
    folder = Folder(Path(job.base))
    places = Places(empty, folder)
    places.require_all()
    wrapped = empty_model_of(job)
    adapted = Adapted(wrapped, [Given(Path(each.folder), each.scale) for each in job.adapters])
    adapted.require_mergeable()
    for each in job.adapters:
        if weights_digest(Path(each.folder)) != each.digest:
            raise PhasedCptError(f"{each.folder}: the adapter has changed since the merge was asked for; ask again")
    dtype = usual_dtype(folder.tensors) if job.dtype == "auto" else TYPES[job.dtype]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Materials(job, empty, places, folder, adapted, dtype, device, _other(job, places))


def _other(job: MergeJob, here: Places) -> Base | None:
    """The whole weights that the base is moved towards."""
    if job.toward is None:
        return None
    folder = Path(job.toward.folder)
    there = weights_of(folder, trust_remote_code=job.trust_remote_code)
    if there.places.shapes != here.shapes:
        raise InputError(f"{folder}: these are not weights of the same architecture as {job.base}")
    return there


def begun(job: MergeJob) -> Path:
    """Where it is made: what an earlier call has made of the same is gone on with."""
    building = building_of(Path(job.output))
    try:
        same = json.loads((building / PLAN).read_bytes())["digest"] == job.digest
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    building.mkdir(parents=True, exist_ok=True)
    if not same:
        empty(building)
    folder = building / MODEL
    folder.mkdir(exist_ok=True)
    for left in (*folder.glob("*.part"), *folder.glob(".*.tmp")):
        left.unlink()
    publish_file(building / PLAN, json.dumps({"digest": job.digest}).encode())
    return folder


def _windows(materials: Materials) -> Windows:
    job, config = materials.job, materials.empty.config.get_text_config()
    if job.held_out is not None and Path(job.held_out).is_dir():
        found = held_out(Path(job.held_out), WINDOWS)
    else:
        found = own_text(Path(job.tokenizer or job.base), int(config.vocab_size))
    most = getattr(config, "max_position_embeddings", None) or found.ids.shape[1]
    return found.first(WINDOWS, min(found.ids.shape[1], int(most)))


def _chosen(
    materials: Materials, four_bits: FourBits | None, windows: Windows, tell: Callable[[str], None]
) -> Choice | None:
    """Of a base that training kept in 4 bits."""
    if four_bits is None:
        return None
    path = building_of(Path(materials.job.output)) / "choice.json"
    try:  # an earlier call has measured: half a model of each would be worse than either
        return Choice(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        pass
    outputs = {"bf16": materials.output(), "dequantized": materials.output(four_bits)}
    measured = windows if windows.are_held_out else None
    choice = choose(
        materials.job.base_kind, outputs, materials.empty, measured, four_bits, materials.device, tell
    )  # fmt: skip
    publish_file(path, json.dumps({"kind": choice.kind, "why": choice.why, "facts": choice.facts}).encode())
    return choice


def _checked(materials: Materials, output: Output, folder: Path, windows: Windows) -> Logits:
    """The folder as it was written, walked beside base and adapters as training had them."""
    fit = tokens_that_fit(materials.empty, 2, materials.device)
    rows = windows.first(CHECK_ROWS, LONGEST if fit is None else max(8, min(CPU_TOKENS, fit // CHECK_ROWS)))
    adapted = materials.adapted
    live = walked(adapted.adapted or adapted.model, Live(adapted, output.base), rows, materials.device)
    there = weights_of(folder, trust_remote_code=materials.job.trust_remote_code)
    merged = walked(there.places.model, there, rows, materials.device)
    exact = materials.dtype == torch.float32
    logits = compared(live, merged, exact=exact)
    if not logits.holds:
        what = f"relative {logits.relative:.1e}, {logits.agreed} of {logits.clear} clear positions agree"
        raise Wrong(f"{materials.job.output}: the merged model is not base and adapter ({what}); not kept")
    return logits


def _publish(job: MergeJob, folder: Path, facts: dict[str, Any], digests: dict[str, str]) -> None:
    """The card, the marker, and then the name."""
    write_card(job, folder, facts)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    paths = [path for path in sorted(folder.iterdir()) if path.name != MERGED_MARKER]
    sizes = {path.name: {"bytes": path.stat().st_size} for path in paths}
    told_files = {name: each | ({"sha256": digests[name]} if name in digests else {}) for name, each in sizes.items()}
    publish_file(folder / MERGED_MARKER, (json.dumps(facts | {"files": told_files}, indent=1) + "\n").encode())
    publish(folder, Path(job.output))
