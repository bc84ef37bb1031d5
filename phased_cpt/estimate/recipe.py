"""What the memory of a phase depends on besides its model: plain numbers, so that a change is another one."""

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from phased_cpt.plan import PhasePlan

HALF, SINGLE = 2, 4  # bytes of a number
LONG_ROWS = 8192  # tokens, above which `auto` takes flex attention (model.base; a test ties the two)


@dataclass(frozen=True)
class Sharding:
    """What the DeepSpeed file of a phase says, in bytes and numbers."""

    stage: int = 2
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    reduce_bucket: int = 0  # numbers
    live_weights: int = 10**9  # numbers that ZeRO-3 gathers before it lets go of any
    step_at_once: int = 10**9  # numbers that ZeRO-3 updates at a time


@dataclass(frozen=True)
class Recipe:
    """How a phase is trained."""

    ranks: int
    ranks_of_a_node: int
    sharding: Sharding
    number: int  # bytes of a weight and an activation: 2, or 4 with fp32
    four_bits: bool
    lora_r: int | None  # None: every weight is trained
    targets: Collection[str]
    dropout: float
    rows: int  # of a micro batch
    tokens: int  # of a row
    accumulation: int  # micro batches in a step
    checkpointing: bool
    loss: str  # chunked, liger or plain
    attention: str  # eager, sdpa, flex_attention, flash_attention_2 or 3
    optimizer: str
    evaluated_rows: int
    converted: bool  # the files hold another number format than the one that is trained in
    on_gpu: bool
    dora: bool = False

    @property
    def accumulates(self) -> bool:
        return self.accumulation > 1

    @property
    def tokens_at_once(self) -> int:
        return self.rows * self.tokens

    @property
    def shards_weights(self) -> bool:
        return self.sharding.stage == 3


# Bytes that an optimizer remembers of each weight, by how its name begins; the first that fits.
_REMEMBERED = (
    ("adamw_torch_8bit", 2.1),
    ("adamw_torch_4bit", 1.1),
    ("paged_adamw_8bit", 2.1),
    ("adamw_8bit", 2.1),
    ("adamw_bnb_8bit", 2.1),
    ("paged_lion_8bit", 1.05),
    ("lion_8bit", 1.05),
    ("lion", 4.0),
    ("paged_lion", 4.0),
    ("sgd", 0.0),
    ("adafactor", 0.1),
)
ADAM = 8.0


def remembered(optimizer: str) -> float:
    """Bytes a weight; of one that is not in the table, what AdamW keeps."""
    return next((size for name, size in _REMEMBERED if optimizer.startswith(name)), ADAM)


def scratch(optimizer: str) -> float:
    """Bytes a weight that a step needs besides: two tensors of intermediate results, unless it is fused."""
    return 8.0 if optimizer in ("adamw_torch", "adamw_torch_xla", "adamw_apex_fused") else 0.0


# Read from a plan -----------------------------------------------------------------------------------------------------


def recipe_of(
    phase: PhasePlan, content: Mapping[str, Any], config: Mapping[str, Any], *, ranks_of_a_node: int, on_gpu: bool
) -> Recipe:
    """The numbers of a phase that is counted for its ranks; `content` is its filled DeepSpeed file."""
    training, lora, tokens = phase.settings.training, phase.settings.lora, phase.settings.data.max_tokens
    assert phase.batch is not None
    return Recipe(
        ranks=phase.batch.ranks,
        ranks_of_a_node=ranks_of_a_node,
        sharding=sharding_of(content),
        number=SINGLE if phase.model.precision == "fp32" else HALF,
        four_bits=phase.model.use_4bit,
        lora_r=lora.r if lora.enabled else None,
        targets=lora.target_modules,
        dropout=lora.dropout,
        rows=training.micro_batch_size,
        tokens=tokens,
        accumulation=phase.batch.accumulation,
        checkpointing=training.gradient_checkpointing,
        loss=_loss(training.loss, config, on_gpu),
        attention=_attention(phase.model.attention, phase.model.precision, tokens, on_gpu),
        optimizer=training.optimizer,
        evaluated_rows=phase.settings.evaluation.micro_batch_size,
        converted=_is_converted(config, phase),
        on_gpu=on_gpu,
        dora=lora.enabled and lora.use_dora,
    )


def sharding_of(content: Mapping[str, Any]) -> Sharding:
    """What a filled DeepSpeed file says."""
    zero = content.get("zero_optimization", {})

    def on_host(part: str) -> bool:
        return (zero.get(part) or {}).get("device") == "cpu"

    return Sharding(
        stage=int(zero.get("stage", 0)),
        optimizer_on_host=on_host("offload_optimizer"),
        weights_on_host=on_host("offload_param"),
        reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
        live_weights=int(zero.get("stage3_max_live_parameters", 1e9)),
        step_at_once=int(zero.get("sub_group_size", 1e9)),
    )


def _loss(asked: str, config: Mapping[str, Any], on_gpu: bool) -> str:
    """As evals.loss chooses, which looks at the model itself."""
    changed = config.get("final_logit_softcapping") or config.get("logits_scaling") not in (None, 1, 1.0)
    if asked == "plain" or changed:
        return "plain"
    liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    return "liger" if liger and asked in ("auto", "liger") else "chunked"


def _attention(asked: str, precision: str, tokens: int, on_gpu: bool) -> str:
    """As model.base tries them."""
    if asked != "auto":
        return asked
    if on_gpu and precision != "fp32" and any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_interface"))):
        return "flash_attention_2"
    return "flex_attention" if on_gpu and tokens > LONG_ROWS else "sdpa"


def _is_converted(config: Mapping[str, Any], phase: PhasePlan) -> bool:
    """Whether what is loaded becomes another type. What does not stays in mapped files, which are nobody's own."""
    wanted = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[phase.model.precision]
    ours = phase.model.from_config is not None or (phase.start.phase is not None and phase.start.form == "base")
    stored = "float32" if ours else config.get("dtype") or config.get("torch_dtype") or wanted
    return bool(stored != wanted)
