"""Whether each phase of a plan fits on a machine, and what would make it fit.

plan, config.json of the base ─ recipe of a phase ─ estimate ─┬ fits, tight, does not fit, not known
                                                              └ other settings that would fit
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from phased_cpt.bases import Base
from phased_cpt.estimate.architecture import Architecture, UnknownShapeError, architecture_of
from phased_cpt.estimate.memory import Estimate, estimate
from phased_cpt.fitting.changes import Tried, tried
from phased_cpt.fitting.files import chosen_file, config_of, recipe_for
from phased_cpt.fitting.hardware import Hardware
from phased_cpt.plan import PhasePlan, Plan
from phased_cpt.run_dir import in_bytes

Verdict = Literal["fits", "tight", "does not fit", "not known"]

TIGHT = 0.9  # of what may be used; the estimate is held to 15 %
CHANGES = 3  # that are told


@dataclass(frozen=True)
class Change:
    """Other settings, and what the phase would then need of the device."""

    set: tuple[str, ...]  # what to type, one option each: --set training.deepspeed=zero3
    bytes: int
    fits: bool  # or is tight at least, where nothing fits
    verdict: Verdict = "fits"

    def __str__(self) -> str:
        return " ".join(self.set)


@dataclass(frozen=True)
class PhaseFit:
    """What one phase needs on each rank."""

    phase: str
    file: str  # the DeepSpeed file that it would use
    device: Estimate
    host: Estimate
    room: int | None  # bytes of the device that may be used
    verdict: Verdict
    why: str
    changes: tuple[Change, ...] = ()


def fit(plan: Plan, base: Base, hardware: Hardware) -> list[PhaseFit]:
    """Every phase of a plan that is counted for its ranks."""
    return [_fit(phase, base, hardware) for phase in plan.phases]


def _fit(phase: PhasePlan, base: Base, hardware: Hardware) -> PhaseFit:
    file = chosen_file(phase, base, hardware)
    try:
        model = architecture_of(config_of(base))
    except UnknownShapeError as unknown:
        return _of_its_files(phase, base, hardware, file, str(unknown))
    recipe = recipe_for(phase, base, hardware, file)
    device, host = estimate(model, recipe)
    verdict, why = _verdict(device, host, hardware)
    told = () if verdict in ("fits", "not known") else tuple(_changes(phase, base, model, hardware))
    return PhaseFit(phase.name, file, device, host, hardware.room, verdict, why, told)


def _of_its_files(phase: PhasePlan, base: Base, hardware: Hardware, file: str, unknown: str) -> PhaseFit:
    """Of an architecture that is not known, the size of the files says how large the weights are, at least."""
    size, nothing = base.size_bytes, Estimate({}, 0)
    device = Estimate({"weights": size}, size, "load") if size else nothing
    least = size // (4 if phase.model.use_4bit else 1) // (1 if file.startswith("zero2") else hardware.ranks)
    if least > hardware.room and not file.endswith("offload"):
        return PhaseFit(phase.name, file, device, nothing, hardware.room, "does not fit", "the weights alone do not")
    return PhaseFit(phase.name, file, device, nothing, hardware.room, "not known", unknown)


def _verdict(device: Estimate, host: Estimate, hardware: Hardware) -> tuple[Verdict, str]:
    if hardware.gpu_bytes == 0:
        return "not known", "nvidia-smi does not say how much memory the GPU has; add --gpu-memory"
    of_device = "GPU" if hardware.gpu_bytes is not None else "host"
    for what, found, room in _rooms(device, host, hardware, of_device):
        if found.peak > room:
            return (
                "does not fit",
                f"{in_bytes(found.peak)} are needed of the {what}, and {in_bytes(room)} may be used",
            )
    for what, found, room in _rooms(device, host, hardware, of_device):
        if found.peak > TIGHT * room:
            return "tight", f"{found.peak / room:.0%} of what may be used of the {what}: the estimate may be 15 % off"
    return "fits", ""


def _rooms(device: Estimate, host: Estimate, hardware: Hardware, of_device: str) -> Iterator[tuple[str, Estimate, int]]:
    if hardware.gpu_bytes is not None:
        yield of_device, device, hardware.room
    if hardware.host_bytes:  # of a machine that is only spoken of it may not be known
        yield "host", host, hardware.host_room


# What would make it fit -----------------------------------------------------------------------------------------------


def _changes(phase: PhasePlan, base: Base, model: Architecture, hardware: Hardware) -> Iterator[Change]:
    """The first that fit; or, where nothing does, the first that is tight, or what comes nearest."""
    told: list[Tried] = []
    nearest: Tried | None = None
    is_tight = False
    for found in tried(phase, base, model, hardware):
        if any(one.settings.keys() <= found.settings.keys() for one in told):
            continue  # with one of them alone, or with less of it, it fits already
        verdict = _verdict(found.device, found.host, hardware)[0]
        if verdict == "fits":
            told.append(found)
            yield _typed(found, phase, "fits")
        if len(told) == CHANGES:
            return
        nearer = nearest is None or verdict == "tight" or _peak(found) < _peak(nearest)
        if not is_tight and nearer:
            nearest, is_tight = found, verdict == "tight"
    if not told and nearest is not None:
        yield _typed(nearest, phase, _verdict(nearest.device, nearest.host, hardware)[0])


def _peak(found: Tried) -> int:
    """Of the device, which is the host where there is no GPU."""
    return found.device.peak or found.host.peak


def _typed(found: Tried, phase: PhasePlan, verdict: Verdict) -> Change:
    """As options of the command line, at the place where a phase has its own value."""
    options = []
    for key, value in found.settings.items():
        section, name = key.split(".")
        own = name in getattr(getattr(phase.phase, section, None), "model_fields_set", ())
        said = str(value).lower() if isinstance(value, bool) else value
        options.append(f"--set phases.{phase.name}.{key}={said}" if own else f"--set {key}={said}")
    return Change(tuple(options), _peak(found), verdict in ("fits", "tight"), verdict)
