"""What the merge after the last phase holds of the host: a layer at a time, its way to the file, and the two walks.

write        base ─ fp32 + adapter ─ rounded ─ two that wait ─ one that is written ─ read back
walk         a decoder layer in memory, over 32 tokens; base and adapter first, then what was written
walked head  some of its rows after the others, and the logits of both walks
compare      the logits, their difference, and what is computed of them
4 bits       after QLoRA: a layer before, through 4 bits, and merged
choice       merge.base: auto; both merged models walked over held-out text, each layer merged as it is asked for
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from phased_cpt.estimate.architecture import EXPERTS, Architecture
from phased_cpt.estimate.memory import Estimate, Parts
from phased_cpt.estimate.recipe import SINGLE

# Of phased_cpt.merge, which loads torch; a test ties them.
PART_BYTES = 32 * 2**20  # of a tensor that is only copied, at a time
WAITING = 2  # tensors between the thread that makes them and the one that writes
HEAD_ROWS = 8192  # of the head, at a time
CHECKED_TOKENS = 2 * 16
WINDOWS, WINDOW_TOKENS = 64, 128
FEWEST_TOKENS = 1024
CPU_OPERATIONS = 2e13
LOGIT_BYTES = 2**28

THROUGH_FOUR_BITS = 16  # bytes a weight: bitsandbytes on a CPU, and the comparison with what went in
CONV1D = 3 * SINGLE  # GPT-2's layers are merged by PEFT: weight, delta, and the delta once more on its way
AT_THE_ENDS = ("lm_head", "embed_tokens", "wte")  # adapters on them are asked for by name


@dataclass(frozen=True)
class MergeRecipe:
    """How the last phase's weights become a model."""

    lora_r: int | None  # None: every weight was trained, and is copied
    targets: Collection[str]
    stored: int  # bytes of a number in the files of the base
    number: int  # and in those of the merged model
    four_bits: bool  # the base was, in training
    base_kind: str  # merge.base
    on_gpu: bool  # where both walks compute then

    @property
    def through_four_bits(self) -> bool:
        return self.four_bits and self.base_kind != "bf16"


def merge_estimate(model: Architecture, how: MergeRecipe) -> Estimate:
    """Of the host, above what Python and its libraries take."""
    moments = {"write": _write(model, how)}
    if not how.on_gpu:
        moments |= {"walk": _walk(model, how), "walked head": _head(model, how), "compare": _compare(model)}
    if how.four_bits and how.lora_r is not None:
        moments["4 bits"] = _four_bits(model, how)
        if how.base_kind == "auto" and not how.on_gpu and (tokens := _measured_tokens(model)):
            moments |= _choice(model, how, tokens)
    return _worst(moments)


def _worst(moments: Mapping[str, Parts]) -> Estimate:
    peaks = {name: sum(parts.values()) for name, parts in moments.items()}
    worst = max(peaks, key=lambda name: peaks[name])
    return Estimate({name: size for name, size in moments[worst].items() if size}, peaks[worst], worst, peaks)


def _largest(model: Architecture, how: MergeRecipe) -> int:
    """Weights of the largest tensor that is made and not copied."""
    if how.lora_r is None:
        return 0
    made = model.linears if how.through_four_bits else model.adapted(how.targets)
    at_the_ends = [model.head] if _ends(how) else []
    return max([each.weights for each in made] + at_the_ends, default=0)


def _ends(how: MergeRecipe) -> bool:
    return any(target.rpartition(".")[2] in AT_THE_ENDS for target in how.targets if how.targets != "auto")


# The moments ----------------------------------------------------------------------------------------------------------


def _write(model: Architecture, how: MergeRecipe) -> Parts:
    """One thread makes, another writes. Where the disk is slower, or one core hashes for many that multiply, it is
    always behind: two tensors wait, one is written, and what comes back from the file is compared with it."""
    copied = min(PART_BYTES, model.largest * how.stored)
    made = _largest(model, how)
    written = max(made * how.number, copied * how.number // how.stored)
    return {"being made": max(made * _making(model, how), copied), "on its way": (WAITING + 2) * written}


def _making(model: Architecture, how: MergeRecipe) -> int:
    """Bytes a weight: in fp32, beside what was read or what it is rounded to."""
    if how.through_four_bits:
        return THROUGH_FOUR_BITS
    beside = max((each for each in (how.stored, how.number) if each < SINGLE), default=0)
    return CONV1D if model.family == "gpt2" else SINGLE + beside


def _walk(model: Architecture, how: MergeRecipe) -> Parts:
    """Linears stay in the type of the file, and are widened as they multiply; experts are read together, in fp32."""
    number = SINGLE if model.family == "gpt2" else max(how.stored, how.number)
    linears = sum(each.weights for each in model.linears)
    adapter = SINGLE * model.adapter(how.lora_r, how.targets) // model.layers if how.lora_r is not None else 0
    # Of experts, the group that was read last is kept as it was: gate and up, two thirds of them.
    as_read = number * model.loose * 2 // 3 if model.family in EXPERTS else 0
    ends = SINGLE * model.head if _ends(how) else 0
    return {"one layer": number * linears + SINGLE * model.loose + as_read, "adapter": adapter, "vocabulary": ends}


def _head(model: Architecture, how: MergeRecipe) -> Parts:
    """Some rows in fp32 while the next are read and become so; the logits of the first walk, and of the second."""
    number = max(how.stored, how.number)
    rows = min(HEAD_ROWS, model.vocabulary) * model.hidden
    a_weight = 2 * SINGLE + (number if number < SINGLE else 0) if model.vocabulary > HEAD_ROWS else SINGLE + number
    return {"rows of the head": rows * a_weight, "logits": 2 * _logits(model, CHECKED_TOKENS)}


def _compare(model: Architecture) -> Parts:
    return {"logits": 2 * _logits(model, CHECKED_TOKENS), "their difference": 2 * _logits(model, CHECKED_TOKENS)}


def _logits(model: Architecture, tokens: int) -> int:
    return SINGLE * tokens * model.vocabulary


# After QLoRA ----------------------------------------------------------------------------------------------------------


def _four_bits(model: Architecture, how: MergeRecipe) -> Parts:
    """What 4 bits have taken, beside what the adapter has given: a layer before, the one merged last, and the way."""
    largest = max((each.weights for each in model.adapted(how.targets)), default=0)
    return {"before and merged": 2 * SINGLE * largest, "through 4 bits": THROUGH_FOUR_BITS * largest}


def _measured_tokens(model: Architecture) -> int:
    """How many go through both models at a time; none where that would take too long."""
    tokens = int(CPU_OPERATIONS / (2 * 2 * model.weights))
    if tokens < FEWEST_TOKENS:
        return 0
    rows = max(1, LOGIT_BYTES // (SINGLE * WINDOW_TOKENS * model.vocabulary))
    return WINDOW_TOKENS * min(WINDOWS, rows, max(1, tokens // WINDOW_TOKENS))


def _choice(model: Architecture, how: MergeRecipe, tokens: int) -> dict[str, Parts]:
    """Each layer is merged as the walk asks for it; of either model the layer that was merged last is kept."""
    largest = max(each.weights for each in model.linears)
    layer = how.number * sum(each.weights for each in model.linears) + SINGLE * model.loose
    merged, inside = SINGLE * largest, SINGLE * tokens * (3 * model.inner + 4 * model.hidden)
    through = THROUGH_FOUR_BITS * largest
    return {
        "choice: weights": {"one layer": layer, "merged last": merged, "through 4 bits": through},
        "choice: layer": {"one layer": layer, "merged last": 2 * merged, "activations": inside},
        "choice: loss": {"merged last": 2 * merged, "logits": 3 * _logits(model, tokens)},
    }
