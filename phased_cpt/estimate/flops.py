"""What a token costs to train, in floating-point operations, and what share of a GPU's peak that is: plain arithmetic.

                    forward   gradient of the input   gradient of the weights
    frozen linear     2n              2n                        –               4 for each of its n weights
    adapter           2r              2r                        2r              6 for each of its r weights
    trained linear    2n              2n                        2n              6
    attention          A              2A                  it has no weights     3A

A token is a position of a document, trained or context; padding is none. Where numbers, names or kernels are not known,
the answer is None: no figure is better than a wrong one.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

HEAD = "lm_head"

# The shape ------------------------------------------------------------------------------------------------------------

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_SEPARATE = (*_QKVO, "gate_proj", "up_proj", "down_proj")

# The linears of a layer by model_type. What is not here (experts, state spaces, latent attention, images, layers of
# unlike size) does not tell its linears by these few numbers. A test holds each row to what transformers builds.
LINEARS: dict[str, tuple[str, ...]] = {
    "gemma": _SEPARATE,
    "gemma2": _SEPARATE,
    "gemma3_text": _SEPARATE,
    "glm": (*_QKVO, "gate_up_proj", "down_proj"),
    "glm4": (*_QKVO, "gate_up_proj", "down_proj"),
    "granite": _SEPARATE,
    "llama": _SEPARATE,
    "ministral3": _SEPARATE,
    "mistral": _SEPARATE,
    "olmo": _SEPARATE,
    "olmo2": _SEPARATE,
    "olmo3": _SEPARATE,
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen2": _SEPARATE,
    "qwen3": _SEPARATE,
    "seed_oss": _SEPARATE,
    "smollm3": _SEPARATE,
    "starcoder2": (*_QKVO, "c_fc", "c_proj"),
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder of equal layers, and the linears that each of them has."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    linears: tuple[str, ...] = _SEPARATE

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_dim  # not `hidden`: Qwen3-32B has 8192 beside 5120

    @property
    def layer_weights(self) -> int:
        """Of the linears of all layers; norms and biases multiply no matrices."""
        return self.layers * sum(wide * high for wide, high in map(self.sides, self.linears))

    @property
    def head_weights(self) -> int:
        """Multiplied with whether or not they are tied to the embedding, which itself is only looked up."""
        return self.hidden * self.vocabulary

    def adapter_weights(self, r: int, names: Iterable[str]) -> int:
        """Of the adapters on these linears of all layers: a linear in → out gets in → r → out."""
        return self.layers * sum(r * sum(self.sides(name)) for name in names)

    def sides(self, linear: str) -> tuple[int, int]:
        """How many numbers go into a linear, and how many come out."""
        attention, kv = self.attention_width, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, attention),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "qkv_proj": (self.hidden, attention + 2 * kv),
            "o_proj": (attention, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "gate_up_proj": (self.hidden, 2 * self.intermediate),
            "c_fc": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
            "c_proj": (self.intermediate, self.hidden),
            HEAD: (self.hidden, self.vocabulary),
        }[linear]


def shape_of(config: object, longest: int | None = None) -> ModelShape | None:
    """The shape that a config of transformers, or its dict, describes; None where that does not tell the cost.

    Never from the live model: ZeRO-3 leaves each rank parameters of 0 elements, and 4 bits pack two weights into one.
    `longest` is the longest document that will be read: a sliding window that is no shorter than that cuts nothing.
    """
    linears = LINEARS.get(_read(config, "model_type"))
    if linears is None or _window_cuts(config, longest):
        return None
    layers, hidden = _read(config, "num_hidden_layers"), _read(config, "hidden_size")
    intermediate, heads = _read(config, "intermediate_size"), _read(config, "num_attention_heads")
    vocabulary = _read(config, "vocab_size")
    if not (layers and hidden and intermediate and heads and vocabulary):
        return None  # a model.from_config that leaves the rest to the defaults of transformers
    kv_heads = _read(config, "num_key_value_heads") or heads
    head_dim = _read(config, "head_dim") or hidden // heads
    return ModelShape(layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, linears)


def _read(config: object, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _window_cuts(config: object, longest: int | None) -> bool:
    """Whether some layers look back less far than a document is long, so that attention costs less than is counted."""
    window = _read(config, "sliding_window")
    if window is None or _read(config, "use_sliding_window") is False:
        return False  # Qwen2.5 has a window written down, and not in use
    reach = longest or _read(config, "max_position_embeddings")
    return reach is None or reach > window


# The cost -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Of one token, forward and backward: what the model asks for (MFU), and what is computed (HFU)."""

    model: float
    executed: float


def flops_per_token(
    shape: ModelShape,
    *,
    lora_r: int | None,
    targets: Collection[str],
    trained_head: bool,
    full: bool,
    checkpointing: bool,
    recomputes_loss: bool,
    mean_square_length: float,
) -> Flops:
    """The cost of a token with an adapter on `targets` ("auto": all linears but the head), or of full training.

    `full` rules: rank, targets and head are then not looked at. As in PEFT, a target that the model does not have gets
    nothing. `recomputes_loss`: the loss runs the head again in its backward pass (TRL's chunked loss does, Liger not).

    `executed` is that of flash attention and of checkpointing with use_reentrant=True. Without reentry torch stops as
    soon as it has what it needs, which spares the last product of each layer: next to nothing where down_proj has an
    adapter, and all of down_proj where it has none and in full training (6 % less than is said here, of an 8B).
    """
    if not full and lora_r is None:
        raise ValueError("a token costs what is trained: give lora_r, or full=True")
    layers, head = shape.layer_weights, shape.head_weights
    adapters = 0 if full else shape.adapter_weights(lora_r or 0, _adapted(shape, targets))
    attention = _attention(shape, mean_square_length)
    model = (6 if full else 4) * layers + (6 if full or trained_head else 4) * head + 6 * adapters + 3 * attention
    executed = model + attention / 2  # flash attention multiplies q and k once more in its backward pass
    if checkpointing:
        executed += 2 * layers + 2 * adapters + attention  # the forward pass of the layers, but not of the head
    if recomputes_loss:
        executed += 2 * head
    return Flops(model, executed)


def _adapted(shape: ModelShape, targets: Collection[str]) -> list[str]:
    """The linears that PEFT finds by these names: `q_proj`, and `self_attn.q_proj` too."""
    names = {target.rpartition(".")[2] for target in targets}
    return [name for name in shape.linears if targets == "auto" or name in names]


def _attention(shape: ModelShape, mean_square_length: float) -> float:
    """Of a forward pass: two products, q·k and p·v, of 2 operations each; a token sees half its document on average."""
    return 2 * shape.layers * shape.attention_width * mean_square_length


def mean_square_length(documents: Iterable[int]) -> float:
    """The length of document that an average token is in: Σs² / Σs, as tokens attend within their document alone.

    [6000] + [1000] + [1000] in a row of 8000 → 4750, where the mean length is 2667, and the row's is 8000
    """
    lengths = [int(length) for length in documents]  # int: the squares of numpy's int32 overflow from 46341 on
    return sum(length * length for length in lengths) / max(1, sum(lengths))  # a rank may be given empty rows


# The share of the peak ------------------------------------------------------------------------------------------------

# Dense bf16 with fp32 accumulation, by the name that torch.cuda.get_device_name gives, less maker and memory size.
# Where NVIDIA's data sheet gives "with sparsity" alone, this is half of it. A name is matched whole: a MIG slice, a
# vGPU, a laptop's chip or an "RTX 4090 D" is another machine, and has no peak here.
PEAKS: dict[str, float] = {
    "B200": 2250e12,  # HGX B200 data sheet: 4.5 PFLOPS with sparsity
    "H200": 989e12,  # H200 data sheet, SXM: 1,979 with sparsity
    "H200 NVL": 835e12,  # same sheet, NVL: 1,671 with sparsity
    "H100 HBM3": 989e12,  # H100 data sheet, SXM: 1,979 with sparsity ("NVIDIA H100 80GB HBM3" is the SXM module)
    "H100 NVL": 835e12,  # same sheet, NVL: 1,671 with sparsity
    "H100 PCIE": 756e12,  # same sheet, PCIe: 1,513 with sparsity
    "A100 SXM4": 312e12,  # A100 data sheet: 312, 624 with sparsity
    "A100 PCIE": 312e12,  # same sheet, the same for both
    "A40": 149.7e12,  # A40 data sheet: 149.7, 299.4 with sparsity
    "A10": 125e12,  # A10 data sheet: 125, 250 with sparsity (AWS's A10G is another chip: not here)
    "L40S": 362e12,  # L40S data sheet: 362.05, 733 with sparsity
    "L40": 181e12,  # L40 data sheet: 181.05, 362.1 with sparsity
    "L4": 121e12,  # L4 data sheet: 242 with sparsity
    "RTX 4090": 165e12,  # Ada white paper: 165.2 with fp32 accumulation (330 is with fp16's, or with sparsity)
}


def peak_of(gpu_name: str, precision: str) -> float | None:
    """Operations a second that the GPU can do at most; None for one that is not in the table.

    fp16 accumulates in fp32 as well, at the speed of bf16. fp32 has no one peak: TF32 may be on or off.
    """
    if precision not in ("bf16", "fp16"):
        return None
    words = re.split(r"[ -]+", gpu_name.upper())
    return PEAKS.get(" ".join(word for word in words if not re.fullmatch(r"NVIDIA|GEFORCE|\d+GB", word)))


class Utilisation(NamedTuple):
    """Shares of the peak: what the model asks for, and what was computed, recomputation counted."""

    mfu: float
    hfu: float


def utilisation(tokens_per_second_per_gpu: float, flops: Flops, peak: float) -> Utilisation:
    rate = tokens_per_second_per_gpu / peak
    return Utilisation(mfu=rate * flops.model, hfu=rate * flops.executed)
