"""Out of memory, told: where, with which rows, what was estimated, and what would need less."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from phased_cpt.bases import Base
from phased_cpt.errors import PhasedCptError
from phased_cpt.fitting import Hardware, PhaseFit, fit, hardware_here
from phased_cpt.job import Job
from phased_cpt.launchers import place_of_ranks
from phased_cpt.plan import PhasePlan
from phased_cpt.run_dir import in_bytes
from phased_cpt.train.engine import device_memory

SHOWN = 5  # parts of an estimate
LESS = 0.75  # of what was estimated: an advice that only just fits is none to one that did not
USUAL = "a smaller training.micro_batch_size or data.max_tokens, deepspeed: zero3 or an offload, model.use_4bit"


@contextlib.contextmanager
def memory_is_told(job: Job, phase: PhasePlan, device: torch.device, where: Callable[[], str]) -> Iterator[None]:
    """What has failed in here for want of memory, in words."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        named = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not named and "can't allocate memory" not in str(error):
            raise
        what = f"out of memory in phase {phase.name}, {where()}: {rows_of(phase)}, {device_memory(device)}"
        raise PhasedCptError("\n".join([what, *_advice(job, phase)])) from error


def rows_of(phase: PhasePlan) -> str:
    """What a rank computes at once."""
    return f"{phase.settings.training.micro_batch_size} rows of {phase.settings.data.max_tokens} tokens"


def _advice(job: Job, phase: PhasePlan) -> Iterator[str]:
    """Of the estimate, which may be wrong, but must not stand in the way of the message."""
    try:
        place = place_of_ranks(os.environ)
        hardware = hardware_here(job.ranks, len(place.counts))
        found = _fit(job, phase, hardware)
        needed = found.device if found.device.peak else found.host  # without a GPU it is all of the host
        largest = sorted(needed.parts.items(), key=lambda part: -part[1])[:SHOWN]
        parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in largest)
        room = f"of {in_bytes(hardware.room)} that may be used"
        estimated = f"estimated for each rank: {in_bytes(needed.peak)} {room} ({parts})"
        changes = _fit(job, phase, _smaller(hardware, needed.peak)).changes
    except Exception:  # nothing is known of this model, or of this machine
        yield f"try {USUAL}"
        return
    yield estimated if needed.peak else f"nothing could be estimated: {found.why}"
    yield from (f"would need {in_bytes(change.bytes)}: {change}" for change in changes)
    if not changes:
        yield f"try {USUAL}"


def _fit(job: Job, phase: PhasePlan, hardware: Hardware) -> PhaseFit:
    base = Base(job.start.base, job.start.base_digest, job.start.shape)
    return next(each for each in fit(job.plan(), base, hardware) if each.phase == phase.name)


def _smaller(hardware: Hardware, peak: int) -> Hardware:
    """A machine on which what has failed is known not to fit."""
    shrunk = replace(hardware, gpu_bytes=int(peak * LESS)) if hardware.gpu_bytes else hardware
    while shrunk.room > peak * LESS:
        shrunk = replace(shrunk, host_bytes=int(shrunk.host_bytes * LESS))
    return shrunk
