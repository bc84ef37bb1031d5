"""The data of every phase: read whole, once, and remembered by its bytes."""

from collections.abc import Iterator

from phased_cpt.plan import PhasePlan
from phased_cpt.preflight.scene import Scene
from phased_cpt.preflight.seen import Seen, ok, warn
from phased_cpt.tables.words import counted


def sources(scene: Scene) -> Iterator[Seen]:
    """Every path leads somewhere; those that do not are told in one go."""
    files = scene.sources.made()
    yield ok(counted(files, "file") if files else "data sets of the hub")


def data(scene: Scene) -> Iterator[Seen]:
    """Every line of every file is read, as `prepare` does it: what is wrong with it is told by file and line."""
    for phase in scene.prepared.made().phases:
        train = phase.train.index.account
        held = phase.eval.index.account if phase.eval else None
        parts = [
            f"{counted(train.documents, 'document')}, {train.tokens_source:,} tokens, {counted(train.blocks, 'row')}"
        ]
        parts += [f"{counted(held.documents, 'document')} held out"] if held else []
        how = " (remembered)" if all(split.cached for split in phase.splits.values()) else ""
        yield ok(f"{phase.plan.name}: {'; '.join(parts)}{how}")


def rows(scene: Scene) -> Iterator[Seen]:
    """Whether a phase has as many rows as a step takes, and something to measure that it is not trained on."""
    prepared, plan = scene.prepared.given(), scene.counted.given()
    found = [*_few(plan.phases), *(_unmeasured(prepared.phase(each.name).eval is None, each) for each in plan.phases)]
    told = [each for each in found if each is not None]
    for copies in prepared.copies():
        if copies.leaks:
            told.append(warn(str(copies), "give that phase eval_sources of its own, or take the copies out"))
    yield from told or [ok(_steps(plan.phases))]


def _few(phases: tuple[PhasePlan, ...]) -> Iterator[Seen]:
    for phase in phases:
        blocks, batch = phase.prepared.blocks if phase.prepared else 0, phase.batch
        if batch is None or blocks >= batch.rows:
            continue
        at_once = batch.micro_batch_size * batch.ranks
        smaller = blocks // at_once * at_once
        fix = f"--set phases.{phase.name}.training.global_batch_size={smaller}" if smaller else "give it more documents"
        yield warn(f"{phase.name}: {counted(blocks, 'row')} is all it has, and a step takes {batch.rows}", fix)


def _unmeasured(nothing: bool, phase: PhasePlan) -> Seen | None:
    if not nothing:
        return None
    return warn(f"{phase.name}: nothing is held out, so nothing can be measured", "give it eval_sources")


def _steps(phases: tuple[PhasePlan, ...]) -> str:
    return "steps: " + ", ".join(f"{phase.name} {phase.steps:,}" for phase in phases if phase.steps)
