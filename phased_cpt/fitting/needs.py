"""What a run will take of the disk, and of somebody's time."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from phased_cpt.bases import RANDOM, Base
from phased_cpt.data.files import find_files, is_hub_id
from phased_cpt.data.prepared import PreparedRun
from phased_cpt.estimate.architecture import Architecture, UnknownShapeError, architecture_of
from phased_cpt.estimate.duration import UTILISATION, seconds_by_peak
from phased_cpt.estimate.flops import mean_square_length
from phased_cpt.estimate.recipe import HALF, SINGLE
from phased_cpt.fitting.files import chosen_file, config_of, recipe_for
from phased_cpt.fitting.hardware import Hardware, name_of_gpu
from phased_cpt.launchers import gpus_here
from phased_cpt.ledger.fingerprint import digest_of
from phased_cpt.plan import PhasePlan, Plan
from phased_cpt.run_dir import publish_file

TOKENS_PER_BYTE = 1.2  # bytes of a token store for a byte of source: a token of four letters has four bytes, at most
SPEEDS = "speeds.json"  # in the folder of the data
FEWEST_STEPS = 10  # of a phase whose speed says something


@dataclass(frozen=True)
class DiskNeed:
    """Something that a run will have written by its end, or holds on its way."""

    what: str
    place: Path
    bytes: int


@dataclass(frozen=True)
class PhaseTime:
    """How long a phase takes; None where nothing tells its speed."""

    phase: str
    seconds: float | None
    from_: str


def disk_needs(plan: Plan, base: Base, run_root: Path, cache: Path, prepared: PreparedRun | None) -> list[DiskNeed]:
    """What a run writes, from its beginning; final_model is a second name of what the last phase has published."""
    return [*_of_the_data(plan, cache, prepared), *_of_the_weights(plan, base, run_root)]


def _of_the_data(plan: Plan, cache: Path, prepared: PreparedRun | None) -> Iterator[DiskNeed]:
    """Tokens, until they are made; of data sets of the hub nobody knows the size before."""
    sources = {source for phase in plan.phases for source in (*phase.phase.sources, *phase.phase.eval_sources)}
    if prepared is None:
        local = {source.path for source in sources if source.split is None and not is_hub_id(source.path)}
        size = sum(file.path.stat().st_size for path in local for file in find_files(path))
        yield DiskNeed("tokens", cache, int(size * TOKENS_PER_BYTE))


def _of_the_weights(plan: Plan, base: Base, run_root: Path) -> Iterator[DiskNeed]:
    try:
        model = architecture_of(config_of(base))
    except UnknownShapeError:
        return
    if plan.config.model.name is not None and not base.size_bytes and is_hub_id(plan.config.model.name):
        yield DiskNeed("download of the base", Path(HF_HUB_CACHE), model.weights * HALF)
    if base.shape is not None:
        yield DiskNeed("random base", run_root / RANDOM, model.weights * SINGLE)
    sizes = {phase.name: _learns(phase, model) for phase in plan.phases}
    on_the_way = [_checkpoints(phase, plan) * sizes[phase.name] for phase in plan.phases]
    kept = sum(on_the_way) if plan.config.checkpoint.keep_published else max(on_the_way)
    yield DiskNeed("checkpoints", run_root, kept)
    yield DiskNeed("published weights", run_root, sum(sizes.values()) * SINGLE)
    if any(phase.start.form == "merged" for phase in plan.phases):
        number = SINGLE if plan.config.model.precision == "fp32" else HALF
        yield DiskNeed("merged bases", run_root, 2 * model.weights * number)  # one goes when the next is there
    if plan.config.merge.enabled:
        merge = plan.config.merge
        number = (
            SINGLE if "fp32" in (merge.dtype, plan.config.model.precision if merge.dtype == "auto" else "") else HALF
        )
        yield DiskNeed("merged model", run_root / merge.output_dir, model.weights * number)


def _learns(phase: PhasePlan, model: Architecture) -> int:
    lora = phase.settings.lora
    if not lora.enabled:
        return model.weights
    return model.adapter(lora.r, lora.target_modules, dora=lora.use_dora)


def _checkpoints(phase: PhasePlan, plan: Plan) -> int:
    """Bytes a weight: as train.saves asks for, before a phase begins."""
    settings = plan.config.checkpoint
    every = settings.keep if phase.steps is None else min(settings.keep, (phase.steps - 1) // settings.every_steps)
    return (every + 1) * 3 * SINGLE + (every + 2) * SINGLE


def phase_times(
    plan: Plan, base: Base, prepared: PreparedRun | None, cache: Path, hardware: Hardware
) -> list[PhaseTime]:
    """Of each phase whose steps are known: by the speed of an earlier one like it here, else by what a GPU can do."""
    return [_time(phase, base, prepared, cache, hardware) for phase in plan.phases]


def _time(phase: PhasePlan, base: Base, prepared: PreparedRun | None, cache: Path, hardware: Hardware) -> PhaseTime:
    if phase.positions is None:
        return PhaseTime(phase.name, None, "its steps are not known before its data is prepared")
    speed = _speeds(cache).get(_alike(phase, base))
    if speed:
        return PhaseTime(
            phase.name, phase.positions / speed["positions_per_second"], f"measured here: {speed['phase']}"
        )
    gpu = name_of_gpu() if hardware.gpu_bytes else ""
    documents = (
        prepared.phase(phase.name).train.index.blocks.slices.length if prepared else [phase.settings.data.max_tokens]
    )
    recipe = recipe_for(phase, base, hardware, chosen_file(phase, base, hardware))
    mean = mean_square_length(documents)
    seconds = seconds_by_peak(config_of(base), recipe, phase.positions, mean, gpu) if gpu else None
    if seconds is None:
        return PhaseTime(
            phase.name, None, f"no phase like it, of {FEWEST_STEPS} steps or more, has been trained here yet"
        )
    return PhaseTime(phase.name, seconds, f"from what it computes, at {UTILISATION:.0%} of the peak of a {gpu}")


def making_bytes(base: Base) -> int:
    """Of the host, while random weights are made: by one rank, all of them, in fp32; 0 once they are there."""
    if base.shape is None or Path(base.folder).exists():
        return 0
    try:
        return 4 * architecture_of(base.shape).weights
    except UnknownShapeError:
        return 0


def remember_speed(phase: PhasePlan, base: Base, cache: Path, steps: int, seconds: float) -> None:
    """How fast a phase was, evaluations and checkpoints included, for the next one like it."""
    if phase.positions is None or not phase.steps or steps < FEWEST_STEPS or seconds <= 0:
        return
    found = {"phase": phase.name, "positions_per_second": steps * phase.positions / phase.steps / seconds}
    cache.mkdir(parents=True, exist_ok=True)
    content = json.dumps(_speeds(cache) | {_alike(phase, base): found}, indent=1)
    publish_file(cache / SPEEDS, content.encode(), shared=True)


def _speeds(cache: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((cache / SPEEDS).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _alike(phase: PhasePlan, base: Base) -> str:
    """What decides how fast a phase is: base, adapter, rows, and how they are computed, on so many of these GPUs."""
    training, data, lora = phase.settings.training, phase.settings.data, phase.settings.lora
    how = training.micro_batch_size, training.gradient_checkpointing, training.loss, training.deepspeed, data.max_tokens
    adapter = (lora.r, lora.target_modules) if lora.enabled else None
    model = phase.model.precision, phase.model.use_4bit, phase.model.attention
    ranks = phase.batch.ranks if phase.batch else 0
    return digest_of([base.digest, adapter, how, model, ranks, gpus_here()])
