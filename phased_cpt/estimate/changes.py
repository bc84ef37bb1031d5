"""What would make a phase fit: other settings, the least painful first, each computed by the same formula."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from phased_cpt.estimate.architecture import Architecture
from phased_cpt.estimate.memory import Estimate, estimate
from phased_cpt.estimate.recipe import Recipe, Sharding

Settings = tuple[tuple[str, str], ...]  # keys and values
Step = tuple[Settings, Recipe]
Files = Mapping[str, Sharding]

AT_MOST = 3  # settings that are changed together
SHORTEST_ROWS = 1024  # tokens; shorter ones are no answer


@dataclass(frozen=True)
class Found:
    """Settings, and what the phase then needs of the device and of the host."""

    settings: Settings
    device: Estimate
    host: Estimate


def changes(model: Architecture, recipe: Recipe, files: Files) -> Iterator[Found]:
    """Single settings, then two of them together, then three; `files` are the DeepSpeed files by their names.

    In the order in which they hurt: what costs nothing but time, then shorter rows and fewer bits.
    """
    for several in range(1, AT_MOST + 1):
        for names in itertools.combinations(_KINDS, several):
            yield from _combined(model, recipe, files, names)


def _combined(model: Architecture, recipe: Recipe, files: Files, names: tuple[str, ...]) -> Iterator[Found]:
    found: list[tuple[Recipe, Settings]] = [(recipe, ())]
    for name in names:
        found = [
            (changed, tuple(dict((*settings, *more)).items()))  # of two DeepSpeed files, the second
            for before, settings in found
            for more, changed in _KINDS[name](before, files)
        ]
    for changed, settings in found:
        yield Found(settings, *estimate(model, changed))


def _checkpointing(recipe: Recipe, files: Files) -> Iterator[Step]:
    if not recipe.checkpointing:
        yield (("training.gradient_checkpointing", "true"),), replace(recipe, checkpointing=True)


def _loss(recipe: Recipe, files: Files) -> Iterator[Step]:
    if recipe.loss == "plain":
        yield (("training.loss", "chunked"),), replace(recipe, loss="chunked")


def _micro_batch(recipe: Recipe, files: Files) -> Iterator[Step]:
    """A row at a time, and as many rows in a step as before."""
    if recipe.rows > 1:
        accumulation = recipe.rows * recipe.accumulation
        settings: Settings = (("training.micro_batch_size", "1"),)
        if not recipe.batch_is_said:
            settings = (*settings, ("training.gradient_accumulation_steps", str(accumulation)))
        yield settings, replace(recipe, rows=1, accumulation=accumulation)


def _evaluated(recipe: Recipe, files: Files) -> Iterator[Step]:
    if recipe.evaluated_rows > 1:
        yield (("evaluation.micro_batch_size", "1"),), replace(recipe, evaluated_rows=1)


def _sharded(recipe: Recipe, files: Files) -> Iterator[Step]:
    if not recipe.shards_weights and recipe.ranks > 1:
        yield (("training.deepspeed", "zero3"),), replace(recipe, sharding=files["zero3"])


def _four_bits(recipe: Recipe, files: Files) -> Iterator[Step]:
    if recipe.lora_r is not None and not recipe.four_bits:
        yield (("model.use_4bit", "true"),), replace(recipe, four_bits=True)


def _offloaded(recipe: Recipe, files: Files) -> Iterator[Step]:
    sharding = recipe.sharding
    if not sharding.optimizer_on_host and sharding.stage:
        name = f"zero{sharding.stage}_offload"
        yield (("training.deepspeed", name),), replace(recipe, sharding=files[name])


def _optimizer(recipe: Recipe, files: Files) -> Iterator[Step]:
    if recipe.optimizer.startswith("adamw_torch") and recipe.lora_r is None and recipe.on_gpu:
        name = "paged_adamw_8bit"
        yield (("training.optimizer", name),), replace(recipe, optimizer=name)


def _shorter(recipe: Recipe, files: Files) -> Iterator[Step]:
    tokens = recipe.tokens // 2
    while tokens >= SHORTEST_ROWS:
        yield (("data.max_tokens", str(tokens)),), replace(recipe, tokens=tokens)
        tokens //= 2


_KINDS = {
    "checkpointing": _checkpointing,
    "loss": _loss,
    "micro batch": _micro_batch,
    "evaluation": _evaluated,
    "sharded": _sharded,
    "offload": _offloaded,
    "four bits": _four_bits,
    "optimizer": _optimizer,
    "shorter": _shorter,
}
