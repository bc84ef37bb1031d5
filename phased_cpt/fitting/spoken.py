"""What `plan --fit` tells: every phase on the hardware that is here, or on some that is only spoken of."""

from dataclasses import asdict
from typing import Any

from phased_cpt.config import Loaded
from phased_cpt.config.values import parse_size
from phased_cpt.errors import InputError
from phased_cpt.estimate.memory import Estimate
from phased_cpt.fitting.files import base_to_estimate
from phased_cpt.fitting.hardware import Hardware, host_memory
from phased_cpt.fitting.merge import MergeFit, fit_merge
from phased_cpt.fitting.phases import PhaseFit, fit
from phased_cpt.launchers import gpus_here
from phased_cpt.plan import Plan, make_plan

Facts = dict[str, Any]


def fit_facts(plan: Plan, gpus: int | None, gpu_memory: str | None, host_memory: str | None) -> Facts:
    """The hardware, and what each phase needs of it; options that are not given mean this machine."""
    hardware = hardware_spoken_of(plan, gpus, gpu_memory, host_memory)
    counted = make_plan(Loaded(plan.config, plan.places), hardware.ranks)
    base = base_to_estimate(counted)
    phases = [_of_phase(found) for found in fit(counted, base, hardware)]
    merge = fit_merge(counted, base, hardware)
    return {
        "hardware": {
            "ranks": hardware.ranks,
            "nodes": hardware.nodes,
            "gpu_bytes": hardware.gpu_bytes,
            "host_bytes": hardware.host_bytes or None,
            "room_bytes": hardware.room,
            "host_room_bytes": hardware.host_room if hardware.host_bytes else None,
        },
        "phases": phases,
        "merge": _of_merge(merge) if merge else None,
    }


def hardware_spoken_of(plan: Plan, gpus: int | None, gpu_memory: str | None, memory: str | None) -> Hardware:
    """This machine, with what is said otherwise; of another GPU's machine the host is not known unless it is said."""
    here, launch = gpus_here(), plan.config.launch
    if gpus and not here and gpu_memory is None:
        raise InputError(f"--gpus {gpus}: there is no GPU here to tell how large they are; add --gpu-memory 80GB")
    gpu_bytes = _size("--gpu-memory", gpu_memory) if gpu_memory else min(here, default=None)
    host_bytes = _size("--host-memory", memory) if memory else 0 if gpu_memory else host_memory()
    of_a_node = gpus or launch.num_gpus or len(here) or 1
    return Hardware(of_a_node * launch.nnodes, launch.nnodes, gpu_bytes, host_bytes)


def _size(option: str, given: str) -> int:
    try:
        if given.strip().isdecimal():
            raise ValueError("a size with its unit is needed")
        size = int(parse_size(given))
    except ValueError as error:
        raise InputError(f"{option}: given {given!r}; {error}: 80GB, 80GiB, 1.5TB") from None
    if size <= 0:
        raise InputError(f"{option}: given {given!r}; more than nothing is needed")
    return size


def _of_phase(found: PhaseFit) -> Facts:
    return {
        "phase": found.phase,
        "file": found.file,
        "verdict": found.verdict,
        "why": found.why,
        "room_bytes": found.room,
        "device": _of(found.device),
        "host": _of(found.host),
        "changes": [asdict(each) for each in found.changes],
    }


def _of_merge(found: MergeFit) -> Facts:
    return {"verdict": found.verdict, "why": found.why, "room_bytes": found.room, "host": _of(found.host)}


def _of(estimate: Estimate) -> Facts:
    return {"peak": estimate.peak, "at": estimate.moment, "parts": dict(estimate.parts)}
