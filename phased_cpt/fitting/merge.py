"""Whether the merge after the last phase fits into the memory of the host."""

from dataclasses import dataclass, replace

from phased_cpt.bases import Base
from phased_cpt.estimate.architecture import UnknownShapeError, architecture_of
from phased_cpt.estimate.memory import Estimate
from phased_cpt.estimate.merging import MergeRecipe, merge_estimate
from phased_cpt.estimate.recipe import HALF, SINGLE
from phased_cpt.fitting.files import config_of
from phased_cpt.fitting.hardware import Hardware
from phased_cpt.fitting.phases import TIGHT, Verdict
from phased_cpt.plan import Plan
from phased_cpt.run_dir import in_bytes


@dataclass(frozen=True)
class MergeFit:
    """What the merge needs of the host: one process, when the ranks are gone."""

    host: Estimate
    room: int | None  # bytes of the host that may be used
    verdict: Verdict
    why: str


def fit_merge(plan: Plan, base: Base, hardware: Hardware) -> MergeFit | None:
    """Of the last phase's weights; None where merge.enabled is false."""
    if not plan.config.merge.enabled:
        return None
    room = replace(hardware, ranks=1, nodes=1).host_room if hardware.host_bytes else None
    try:
        model = architecture_of(config_of(base))
    except UnknownShapeError as unknown:
        return MergeFit(Estimate({}, 0), room, "not known", str(unknown))
    found = merge_estimate(model, merge_recipe(plan, base, on_gpu=hardware.gpu_bytes is not None))
    return MergeFit(found, room, *_verdict(found.peak, room))


def merge_recipe(plan: Plan, base: Base, *, on_gpu: bool) -> MergeRecipe:
    """As `phased_cpt.merging` asks for it after a run."""
    last, merge = plan.phases[-1], plan.config.merge
    lora, config = last.settings.lora, config_of(base)
    ours = base.shape is not None or any(not phase.settings.lora.enabled for phase in plan.phases)
    kept = "float32" if ours else config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    written = last.model.precision if merge.dtype == "auto" else merge.dtype
    return MergeRecipe(
        lora_r=lora.r if lora.enabled else None,
        targets=lora.target_modules,
        stored=SINGLE if kept == "float32" else HALF,
        number=SINGLE if written == "fp32" else HALF,
        four_bits=last.model.use_4bit,
        base_kind=merge.base,
        on_gpu=on_gpu,
    )


def _verdict(peak: int, room: int | None) -> tuple[Verdict, str]:
    if room is None:
        return "not known", "the host's memory is not; add --host-memory"
    if peak > room:
        what = f"{in_bytes(peak)} are needed of the host, and {in_bytes(room)} may be used"
        return "does not fit", f"{what}; --set merge.enabled=false, and `phased-cpt merge` on a larger one"
    if peak > TIGHT * room:
        return "tight", f"{peak / room:.0%} of what may be used of the host"
    return "fits", ""
