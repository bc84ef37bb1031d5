"""What would make a phase fit: other settings, the least painful first, each tried as if it had been typed."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from phased_cpt.bases import Base
from phased_cpt.config.inherit import AnySection
from phased_cpt.estimate.architecture import Architecture
from phased_cpt.estimate.memory import Estimate, estimate
from phased_cpt.estimate.recipe import Recipe
from phased_cpt.fitting.files import chosen_file, recipe_for
from phased_cpt.fitting.hardware import Hardware
from phased_cpt.plan import PhasePlan
from phased_cpt.schedule import batch_of

Settings = dict[str, str | int | float | bool]  # by their dotted keys

AT_MOST = 3  # kinds of change at a time
LOWEST_RANK = 8  # of an adapter; what is lower teaches little
SHORTEST_ROWS = 1024  # tokens; shorter ones are no answer


@dataclass(frozen=True)
class Tried:
    """A phase with other settings, and what it needs then."""

    settings: Settings
    phase: PhasePlan
    recipe: Recipe
    device: Estimate
    host: Estimate


def tried(phase: PhasePlan, base: Base, model: Architecture, hardware: Hardware) -> Iterator[Tried]:
    """One kind of change, then two of them together, then three."""

    def with_(settings: Settings) -> Tried:
        changed = changed_by(settings, phase)
        recipe = recipe_for(changed, base, hardware, chosen_file(changed, base, hardware))
        return Tried(settings, changed, recipe, *estimate(model, recipe))

    for several in range(1, AT_MOST + 1):
        for kinds in itertools.combinations(_KINDS, several):
            found = [with_({})]
            for kind in kinds:
                found = [
                    with_(before.settings | more) for before in found for more in kind(before.phase, before.recipe)
                ]
            yield from found


def changed_by(settings: Settings, phase: PhasePlan) -> PhasePlan:
    """The phase as it would be planned with these settings."""

    def changed(section: AnySection, name: str) -> AnySection:
        own = {key.removeprefix(f"{name}."): value for key, value in settings.items() if key.startswith(f"{name}.")}
        return section.model_copy(update=own)

    old = phase.settings
    training = changed(old.training, "training")
    data, evaluation = changed(old.data, "data"), changed(old.evaluation, "evaluation")
    lora = changed(old.lora, "lora")
    how = training.micro_batch_size, training.gradient_accumulation_steps, training.global_batch_size
    return replace(
        phase,
        model=changed(phase.model, "model"),
        settings=replace(old, training=training, data=data, evaluation=evaluation, lora=lora),
        batch=batch_of(phase.batch.ranks, *how) if phase.batch else None,
    )


# The kinds, in the order in which they hurt ---------------------------------------------------------------------------


def _checkpointing(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    if not recipe.checkpointing:
        yield {"training.gradient_checkpointing": True}


def _loss(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    if phase.settings.training.loss == "plain":
        yield {"training.loss": "auto"}


def _micro_batch(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    """A row at a time, and as many rows in a step as before."""
    if recipe.rows > 1:
        settings: Settings = {"training.micro_batch_size": 1}
        if phase.settings.training.global_batch_size is None:  # else the accumulation follows from it
            settings["training.gradient_accumulation_steps"] = recipe.rows * recipe.accumulation
        yield settings


def _evaluated(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    if recipe.evaluated_rows > 1:
        yield {"evaluation.micro_batch_size": 1}


def _sharded(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    if not recipe.shards_weights and recipe.ranks > 1:
        yield {"training.deepspeed": "zero3"}


def _offloaded(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    if recipe.sharding.stage and not recipe.sharding.optimizer_on_host:
        yield {"training.deepspeed": f"zero{recipe.sharding.stage}_offload"}


def _eight_bits(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    """Of the moments, where they are of every weight."""
    if recipe.optimizer.startswith("adamw_torch") and recipe.lora_r is None and recipe.on_gpu:
        yield {"training.optimizer": "paged_adamw_8bit"}


def _four_bits(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    if recipe.lora_r is not None and not recipe.four_bits:
        yield {"model.use_4bit": True}


def _lower_rank(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    """At the same scale; of an adapter that was given the rank is what it is."""
    rank, lora = (recipe.lora_r or 0) // 2, phase.settings.lora
    while rank >= LOWEST_RANK and phase.model.adapter is None:
        alpha = lora.alpha * (math.sqrt(rank / lora.r) if lora.use_rslora else rank / lora.r)
        yield {"lora.r": rank, "lora.alpha": int(alpha) if alpha % 1 == 0 else alpha}
        rank //= 2


def _shorter(phase: PhasePlan, recipe: Recipe) -> Iterator[Settings]:
    tokens = recipe.tokens // 2
    while tokens >= SHORTEST_ROWS:
        yield {"data.max_tokens": tokens}
        tokens //= 2


_KINDS: tuple[Callable[[PhasePlan, Recipe], Iterator[Settings]], ...] = (
    _checkpointing,
    _loss,
    _micro_batch,
    _evaluated,
    _sharded,
    _offloaded,
    _eight_bits,
    _four_bits,
    _lower_rank,
    _shorter,
)
