"""What the configuration alone tells, and the DeepSpeed files that follow from it."""

from collections.abc import Iterator

from phased_cpt import deepspeed_file
from phased_cpt.deepspeed_file import Content
from phased_cpt.preflight.scene import Scene
from phased_cpt.preflight.seen import Seen, fail, ok, told, warn


def configuration(scene: Scene) -> Iterator[Seen]:
    """Its rules hold, or there would be no plan; what is allowed and odd, and what this version does not do."""
    phases = scene.plan.phases
    warnings = scene.plan.warnings()
    yield from (told(warning, "warn") for warning in warnings)
    if not warnings:
        yield ok(f"{len(phases)} phases: {', '.join(phase.name for phase in phases)}")


def batch(scene: Scene) -> Iterator[Seen]:
    """Rows of a step, on the ranks that there are."""
    shapes = {str(phase.name): phase.batch for phase in scene.by_ranks.made().phases if phase.batch}
    for made in dict.fromkeys(shapes.values()):
        names = ", ".join(name for name, each in shapes.items() if each == made)
        parts = f"{made.micro_batch_size} × {made.accumulation} × {made.ranks} ranks"
        yield ok(f"{made.rows} rows a step = {parts} ({names})")


def deepspeed(scene: Scene) -> Iterator[Seen]:
    """The file of each phase, filled, and held against the plan."""
    for name, file in scene.files.made().items():
        parts = [f"ZeRO-{deepspeed_file.stage_of(file)}", *_offloaded(file)]
        yield ok(f"{name}: {', '.join(parts)}")


def four_bits(scene: Scene) -> Iterator[Seen]:
    """ZeRO-3 shards 4-bit weights only in the type of the others, and only after each rank has loaded all of them."""
    model = scene.plan.config.model
    if not model.use_4bit:
        yield ok("the base is not held in 4 bits")
        return
    storage = model.precision if model.bnb_4bit_quant_storage == "auto" else model.bnb_4bit_quant_storage
    sharded = [name for name, file in scene.files.given().items() if deepspeed_file.stage_of(file) == 3]
    if sharded and storage != model.precision:
        found = f"4-bit weights are stored as {storage}, and ZeRO-3 ({', '.join(sharded)}) shards {model.precision}"
        yield fail(found, "--set model.bnb_4bit_quant_storage=auto")
    elif sharded:
        found = f"ZeRO-3 ({', '.join(sharded)}) shards a 4-bit base only after each rank has loaded all of it"
        yield warn(found, "--set training.deepspeed=zero2")
    else:
        yield ok(f"nf4, stored as {storage}")


def _offloaded(file: Content) -> Iterator[str]:
    zero = file.get("zero_optimization", {})
    for part in ("optimizer", "param"):
        if (zero.get(f"offload_{part}") or {}).get("device") == "cpu":
            yield f"{part} offloaded to the host"


def offloads(file: Content) -> bool:
    return any(_offloaded(file))
