"""The memory of a phase on one rank: what is held at each moment of it, and which moment holds the most.

    load      the weights, whole where they are quantised or kept whole
    engine    fp32 masters of what is trained, beside the flat copy of it
    head      everything up to the loss, with what all layers have left behind
    layer     the last layer on the way back
    end       the first one, when every gradient is there
    step      the optimizer, with gradients in fp32
    save      a checkpoint or an evaluation

Masters and moments are in fp32 under ZeRO. P is what is trained, N the ranks, in bytes a weight:
                     weights   masters   moments   gradients   in the step
    ZeRO-2, bf16        2        4/N       8/N        2/N       (2+2+4)/N
    ZeRO-3, bf16       2/N       4/N       8/N        2/N       (2+2+4)/N
    without ZeRO, fp32  4         –         8          4           4
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from phased_cpt.estimate import activations
from phased_cpt.estimate.architecture import Architecture
from phased_cpt.estimate.recipe import SINGLE, Recipe, remembered, scratch

Parts = dict[str, int]
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)  # nf4; a byte for each 64 weights, and fp32 for each 256 of those
AT_ONCE = 2**22  # elements of train.masters that are gathered at a time


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for, at the moment at which they are the most."""

    parts: Mapping[str, int]
    peak: int
    moment: str = ""
    moments: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Held:
    """What a rank holds at a moment, on its device and on the host."""

    device: Parts
    host: Parts


def estimate(model: Architecture, recipe: Recipe) -> tuple[Estimate, Estimate]:
    """Of the device of a rank, and of its share of the host."""
    moments = {
        "load": _load(model, recipe),
        "engine": _engine(model, recipe),
        "head": _head(model, recipe),
        "layer": _layer(model, recipe),
        "end": _end(model, recipe),
        "step": _step(model, recipe),
        "save": _save(model, recipe),
    }
    if not recipe.on_gpu:  # all of it is host memory
        moments = {name: Held({}, _sum(held.device, held.host)) for name, held in moments.items()}
    return _of({name: held.device for name, held in moments.items()}), _of(
        {n: held.host for n, held in moments.items()}
    )


def _of(moments: Mapping[str, Parts]) -> Estimate:
    peaks = {name: sum(parts.values()) for name, parts in moments.items()}
    worst = max(peaks, key=lambda name: peaks[name])
    parts = {name: size for name, size in moments[worst].items() if size}
    return Estimate(parts, peaks[worst], worst, peaks)


def _sum(*several: Parts) -> Parts:
    names = dict.fromkeys(name for parts in several for name in parts)
    return {name: sum(parts.get(name, 0) for parts in several) for name in names}


# What is there all the time -------------------------------------------------------------------------------------------


def trained(model: Architecture, recipe: Recipe) -> int:
    """How many weights learn."""
    return model.weights if recipe.lora_r is None else model.adapter(recipe.lora_r, recipe.targets, dora=recipe.dora)


def weights_whole(model: Architecture, recipe: Recipe) -> int:
    """Bytes of the base."""
    if not recipe.four_bits:
        return model.weights * recipe.number
    return int(model.in_linears * FOUR_BITS) + (model.weights - model.in_linears) * recipe.number


def _share(size: float, recipe: Recipe) -> int:
    """Of what the ranks share under any ZeRO."""
    return int(size / (recipe.ranks if recipe.sharding.stage else 1))


def _standing(model: Architecture, recipe: Recipe) -> Held:
    """Weights, masters and moments."""
    how, learns = recipe.sharding, trained(model, recipe)
    base, adapter = weights_whole(model, recipe), learns * recipe.number if recipe.lora_r is not None else 0
    if recipe.shards_weights:
        base, adapter = base // recipe.ranks, adapter // recipe.ranks
    masters = 0 if recipe.number == SINGLE and how.stage in (0, 3) else _share(learns * SINGLE, recipe)
    moments = _share(learns * remembered(recipe.optimizer), recipe)
    weights = {"weights": base, "adapter": adapter}
    optimizer = {"masters": masters, "moments": moments}
    device = ({} if how.weights_on_host else weights) | ({} if how.optimizer_on_host else optimizer)
    host = (weights if how.weights_on_host else {}) | (optimizer if how.optimizer_on_host else {})
    if how.optimizer_on_host:  # their gradients in fp32, and a copy of the weights on their way back
        host["gradients"] = _share(learns * (SINGLE + recipe.number), recipe)
    device |= {"buckets": _buckets(recipe), "gathered": _gathered(model, recipe)}
    return Held(device, host)


def _buckets(recipe: Recipe) -> int:
    """ZeRO-2 has two, so that one is filled while the other is sent."""
    return recipe.sharding.reduce_bucket * recipe.number * (2 if recipe.sharding.stage == 2 else 1)


def _gathered(model: Architecture, recipe: Recipe) -> int:
    """The whole weights that ZeRO-3 computes with, and lets go of when there are too many."""
    if not recipe.shards_weights or (recipe.ranks == 1 and not recipe.sharding.weights_on_host):
        return 0
    a_number = weights_whole(model, recipe) / model.weights
    return int(a_number * min(model.weights, max(recipe.sharding.live_weights, model.layer, model.head)))


def _gradients(model: Architecture, recipe: Recipe) -> int:
    """Of the micro batches before, in the parts of this rank."""
    if recipe.sharding.optimizer_on_host:
        return 0
    return _share(trained(model, recipe) * recipe.number, recipe)


# The moments ----------------------------------------------------------------------------------------------------------


def _load(model: Architecture, recipe: Recipe) -> Held:
    """4-bit weights are quantised whole on the device, before ZeRO-3 shards them; others come over the host."""
    whole, learns = weights_whole(model, recipe), trained(model, recipe)
    adapter = learns * recipe.number if recipe.lora_r is not None else 0
    one_more = min(learns, model.largest) * SINGLE  # is copied at a time
    kept = {"first weights": 0 if recipe.shards_weights else learns * SINGLE + one_more}
    if recipe.four_bits:
        one = model.largest * recipe.number  # is quantised at a time
        return Held({"weights": whole, "adapter": adapter, "being quantised": one}, kept)
    if recipe.shards_weights:
        return Held({"weights": whole // recipe.ranks, "adapter": adapter}, {"being loaded": model.largest * 2})
    in_files = 0 if recipe.on_gpu and not recipe.converted else whole
    return Held({}, {"weights": in_files, "adapter": adapter} | kept)


def _engine(model: Architecture, recipe: Recipe) -> Held:
    """The optimizer's gradients are made once with zeros; the moments come with the first step."""
    standing, learns = _standing(model, recipe), trained(model, recipe)
    kept = {"first weights": 0 if recipe.shards_weights else learns * SINGLE}
    device = {name: size for name, size in standing.device.items() if name not in ("moments", "gathered")}
    if recipe.sharding.stage == 3:
        device["moments"] = standing.device.get("moments", 0)
    in_zeros = 0 if recipe.sharding.optimizer_on_host else _share(learns * SINGLE, recipe)
    flat = learns * recipe.number if recipe.sharding.stage == 2 else 0
    return Held(device | {"gradients": max(in_zeros, flat)}, _sum(standing.host, kept))


def _pass(model: Architecture, recipe: Recipe, gradients: int, **more: int) -> Held:
    standing = _standing(model, recipe)
    device = standing.device | {"gradients": gradients, "attention mask": activations.mask(recipe)} | more
    return Held(device, standing.host)


def _head(model: Architecture, recipe: Recipe) -> Held:
    before = _gradients(model, recipe) if recipe.accumulates or recipe.shards_weights else 0
    kept, loss = activations.kept_inputs(model, recipe), activations.head(model, recipe)
    return _pass(model, recipe, before, activations=kept, loss=loss)


def _layer(model: Architecture, recipe: Recipe) -> Held:
    before = _gradients(model, recipe) if recipe.accumulates or recipe.shards_weights else 0
    kept, one = activations.kept_inputs(model, recipe), activations.of_one_layer(model, recipe)
    held = {"activations": kept, "one layer": one, "dequantised": _dequantised(model, recipe)}
    held |= {"DoRA": _dora(model, recipe)} if recipe.dora else {}
    return _pass(model, recipe, before, **held)


def _end(model: Architecture, recipe: Recipe) -> Held:
    """Back at the first layer: what came before it is gone, and the gradients of all layers are there."""
    sets = 2 if recipe.accumulates and not recipe.shards_weights else 1
    held = {"one layer": activations.of_one_layer(model, recipe), "dequantised": _dequantised(model, recipe)}
    return _pass(model, recipe, sets * _gradients(model, recipe), **held)


def _dequantised(model: Architecture, recipe: Recipe) -> int:
    """One linear of 4 bits at a time."""
    return max(each.weights for each in model.linears) * recipe.number if recipe.four_bits else 0


def _dora(model: Architecture, recipe: Recipe) -> int:
    """B·A, its scaled copy, their sum with the weight and an identity, of one linear at a time, to know its lengths.

    Behind dropout the weight is multiplied with once more: of 4 bits, what was made of a layer for that is kept.
    """
    found = model.adapted(recipe.targets)
    at_once = max((3 * each.weights + each.wide**2 for each in found), default=0)
    kept = sum(each.weights for each in found) if recipe.four_bits and recipe.dropout else 0
    return (at_once + kept) * recipe.number


def _step(model: Architecture, recipe: Recipe) -> Held:
    """The gradients once more in a row and in fp32; ZeRO-3 takes a part of the weights after the other."""
    standing, learns = _standing(model, recipe), trained(model, recipe)
    if recipe.sharding.optimizer_on_host:
        host = standing.host | {"step": _share(learns * scratch(recipe.optimizer), recipe)}
        return Held(standing.device, host)
    at_once = _share(learns, recipe)
    if recipe.shards_weights:
        at_once = min(at_once, recipe.sharding.step_at_once)
    in_a_row = recipe.number if recipe.sharding.stage else 0
    in_fp32 = SINGLE if recipe.number < SINGLE else 0
    a_weight = in_a_row + in_fp32 + scratch(recipe.optimizer)
    more = {"gradients": _gradients(model, recipe), "step": int(at_once * a_weight), "gathered": 0}
    device = standing.device | more
    return Held(device, standing.host)


def _save(model: Architecture, recipe: Recipe) -> Held:
    """A few masters are gathered at a time, the largest alone; or a few rows are evaluated."""
    standing = _standing(model, recipe)
    largest = model.largest if recipe.lora_r is None else 0
    gathered = max(AT_ONCE, largest) * SINGLE * (2 if recipe.shards_weights and recipe.ranks > 1 else 1)
    evaluated = activations.head(model, recipe, learns=False)
    held = {"gathered for a checkpoint": gathered} if gathered > evaluated else {"loss": evaluated}
    return Held(standing.device | held, standing.host)
