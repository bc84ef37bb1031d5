"""What a forward and a backward pass hold besides the weights: of the layers, of attention's mask, and of the head.

With checkpointing, what a layer was given is kept of every layer, and the rest of one layer at a time is computed anew:

    forward    ▁▂▃▄▅ head       each layer leaves its input behind
    backward   head ▅█ ▄█ ▃█    and is computed once more, whole
"""

from phased_cpt.estimate.architecture import Architecture
from phased_cpt.estimate.recipe import SINGLE, Recipe

CHUNK_ELEMENTS = 2**26  # logits of a chunk of evals.loss; a test ties the two
SHORTEST_CHUNK = 128  # tokens
CHUNKED, PLAIN = 12, 12  # bytes a logit: the logits, their fp32, and what of them is kept or computed next
_DENSE = ("sdpa", "eager")


def kept_inputs(model: Architecture, recipe: Recipe) -> int:
    """What every layer was given, where the rest is computed twice; or all that the layers keep."""
    if recipe.checkpointing:
        return model.layers * recipe.tokens_at_once * model.hidden * recipe.number
    return model.layers * saved_of_layer(model, recipe)


def saved_of_layer(model: Architecture, recipe: Recipe) -> int:
    """All that the backward pass of one layer asks for."""
    a_token = (
        _norms(model, recipe) + _attention(model, recipe) + _feed_forward(model, recipe) + _adapters(model, recipe)
    )
    return recipe.tokens_at_once * int(a_token) + _mask_of_layer(model, recipe)


def of_one_layer(model: Architecture, recipe: Recipe) -> int:
    """Of a layer that is computed anew and gone back through: all it keeps, and the gradients under way in it."""
    saved = saved_of_layer(model, recipe) if recipe.checkpointing else 0
    under_way = recipe.number * (3 * model.inner + 2 * model.hidden)
    return saved + recipe.tokens_at_once * under_way


def _norms(model: Architecture, recipe: Recipe) -> float:
    """RMS norms compute in fp32, and keep what they were given as that."""
    wide = model.hidden * 2 + (model.q_width + model.kv_width if model.qk_norm else 0)
    in_fp32 = SINGLE if model.rms_norm and recipe.number < SINGLE else 0
    own = recipe.number if recipe.number < SINGLE or not model.rms_norm else recipe.number / 2  # of the second one
    normed = recipe.number if recipe.lora_r is None else 0  # for the gradient of the norm's own weight
    return wide * (in_fp32 + normed) + (0 if in_fp32 else own * wide)


def _attention(model: Architecture, recipe: Recipe) -> float:
    """q, k and v behind the rotation, and what comes out of it."""
    keys = 2 * model.kv_width if recipe.attention.startswith("f") else 2 * model.q_width  # repeated for a dense mask
    probabilities = 0
    if recipe.attention == "eager":
        probabilities = model.heads * recipe.tokens * (SINGLE + 2 * recipe.number)
    return recipe.number * (2 * model.q_width + keys) + SINGLE * model.heads + probabilities


def _feed_forward(model: Architecture, recipe: Recipe) -> float:
    """gate, its activation, and what goes in beside it; GELU keeps what it was given, and a tanh or two."""
    return recipe.number * model.inner * 3


def _adapters(model: Architecture, recipe: Recipe) -> float:
    """What goes into the linears that learn: of an adapter with dropout, a copy of its own and what was dropped."""
    if recipe.lora_r is None:
        shared = {("in", model.hidden), ("out", model.q_width), ("up", model.hidden), ("down", model.inner)}
        return recipe.number * sum(width for _, width in shared)
    found = model.adapted(recipe.targets)
    if recipe.dropout:
        dropped = 1 if recipe.on_gpu else recipe.number  # a mask of bytes, or of numbers
        copies = sum(each.wide for each in found) * (recipe.number + dropped)
    else:  # what several linears are given is kept once
        copies = sum({_GIVEN.get(each.name, each.name): each.wide for each in found}.values()) * recipe.number
    lengths = 2 * sum(each.high for each in found) if recipe.dora else 0  # what they scale: of the base, and of B·A
    return copies + recipe.number * (recipe.lora_r * len(found) + lengths)


# Linears that are given the same.
_GIVEN = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "shared_expert_gate"), "feed-forward"),
}


# The mask of attention ------------------------------------------------------------------------------------------------


def mask(recipe: Recipe) -> int:
    """Which token sees which, as a table: of kernels that know no documents."""
    return recipe.rows * recipe.tokens**2 if recipe.attention in _DENSE else 0


def _mask_of_layer(model: Architecture, recipe: Recipe) -> int:
    """The same in the numbers that the kernel adds."""
    return mask(recipe) * recipe.number if recipe.attention == "sdpa" else 0


# The head -------------------------------------------------------------------------------------------------------------


def head(model: Architecture, recipe: Recipe, *, learns: bool = True) -> int:
    """The loss: of all logits, or of some at a time with what the backward pass wants of them."""
    rows, tokens = (recipe.rows if learns else recipe.evaluated_rows), recipe.tokens
    if recipe.loss == "plain":
        return rows * tokens * model.vocabulary * PLAIN
    if recipe.loss == "liger":
        chunk = -(-tokens // max(1, -(-model.vocabulary // model.hidden)))
        chunk = min(tokens, 1 << (chunk - 1).bit_length())
    else:
        chunk = min(tokens, max(SHORTEST_CHUNK, CHUNK_ELEMENTS // model.vocabulary))
    a_logit = CHUNKED if chunk < tokens else CHUNKED - recipe.number
    hidden = rows * tokens * model.hidden * recipe.number * (3 if learns else 2)  # it, its kept tokens, its gradient
    return chunk * model.vocabulary * a_logit + hidden + (_gradient_of_head(model, recipe) if learns else 0)


def _gradient_of_head(model: Architecture, recipe: Recipe) -> int:
    """Where it is trained: a sum in fp32, a chunk's share of it, and what is kept of each row."""
    if recipe.lora_r is not None:
        return 0
    return model.head * (SINGLE + (recipe.rows + 1) * recipe.number + (SINGLE if recipe.number < SINGLE else 0))
