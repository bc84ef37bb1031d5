"""The whole YAML on one page: every key, its default, its limits and one sentence about it.

Each key also says what a change of it means for a run that has begun:
  recipe       it moves the result       → refused under a phase that has begun
  execution    how, not what             → goes on, and is recorded as inexact
  bookkeeping  names, places, logs       → free
Paths are bookkeeping because the bytes behind them are fingerprinted instead: a folder may move, its contents may not.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

from phased_cpt.config.values import (
    leaves_the_base_alone,
    not_a_boolean,
    not_a_number,
    one_or_many,
    parse_size,
    path_as_source,
    place,
    whole_number,
)

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# No dots, and not digits alone, so that phases.<name>.… and phases.0.… cannot be confused. No name is reserved: the
# folder of a phase is phase<N>_<name>.
PHASE_NAME = r"^([A-Za-z]|[0-9]+[A-Za-z_-])[A-Za-z0-9_-]*$"

Whole = Annotated[int, BeforeValidator(whole_number)]
Real = Annotated[float, BeforeValidator(not_a_boolean)]
# The limit comes first: behind a validator, or on an optional field, JSON Schema would not show it.
Count = Annotated[int, Field(ge=0), BeforeValidator(whole_number)]
Natural = Annotated[int, Field(ge=1), BeforeValidator(whole_number)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(not_a_boolean)]
NotNegative = Annotated[float, Field(ge=0), BeforeValidator(not_a_boolean)]
Nats = Annotated[float, Field(ge=-1000, le=1000), BeforeValidator(not_a_boolean)]
Share = Annotated[float, Field(gt=0, lt=1), BeforeValidator(not_a_boolean)]
Flag = Annotated[bool, BeforeValidator(not_a_number)]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    Field(gt=0),
    WithJsonSchema({"type": ["integer", "string"], "examples": ["2GB", "1.5GiB"]}),
]
FirstWeights = Annotated[Literal["default", "gaussian", "orthogonal"], BeforeValidator(leaves_the_base_alone)]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(place)]


def recipe(default: Any, sentence: str, **limits: Any) -> Any:
    return _key("recipe", default, sentence, limits)


def execution(default: Any, sentence: str, **limits: Any) -> Any:
    return _key("execution", default, sentence, limits)


def bookkeeping(default: Any, sentence: str, **limits: Any) -> Any:
    return _key("bookkeeping", default, sentence, limits)


def _key(kind: str, default: Any, sentence: str, limits: dict[str, Any]) -> Any:
    return Field(default, description=sentence, json_schema_extra={"change": kind}, **limits)


class Section(BaseModel):
    """One part of the configuration: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Run(Section):
    """What this run is called and where it writes."""

    name: str = bookkeeping("phased-cpt", "Name of the run; its folder begins with it.", pattern=RUN_NAME)
    output_dir: Place = bookkeeping("outputs", "Folder that holds the run folders.")
    dir: Place | None = bookkeeping(None, "This run's own folder, instead of <output_dir>/<name>-<time>.")
    cache_dir: Place | None = bookkeeping(
        None, "Folder of the tokenised data, shared by runs; <output_dir>/cache if absent."
    )
    seed: Whole = recipe(42, "Seed of the order of the data, of dropout and of fresh weights.", ge=0, lt=2**32)


class Model(Section):
    """The base model that the curriculum starts from."""

    name: Place | None = bookkeeping(None, "Base model: a hub id or a folder.")
    revision: Text | None = bookkeeping(None, "Branch, tag or commit of a hub model; the commit is recorded.")
    from_config: dict[str, JsonValue] | Place | None = recipe(
        None, "Start from random weights of this architecture (a config.json's keys, or its path) instead of `name`."
    )
    tokenizer: Place | None = bookkeeping(
        None, "Tokenizer: hub id, folder or tokenizer.json; the model's own if absent."
    )
    eos_token: Text | None = recipe(None, "Token that ends a document; what the tokenizer says if absent.")
    adapter: Place | None = bookkeeping(None, "LoRA adapter that phase 1 continues; a fresh one if absent.")
    precision: Literal["bf16", "fp16", "fp32"] = recipe("bf16", "Number format of weights and activations.")
    attention: Literal["auto", "flash_attention_3", "flash_attention_2", "flex_attention", "sdpa", "eager"] = execution(
        "auto", "Attention kernel; auto takes the fastest that keeps packed documents apart."
    )
    use_4bit: Flag = recipe(False, "QLoRA: hold the frozen base in 4 bits (nf4, double quantisation).")
    bnb_4bit_quant_storage: Literal["auto", "bf16", "fp16", "fp32", "uint8"] = execution(
        "auto", "Type in which the 4-bit weights are stored; auto is `precision`, as ZeRO-3 needs it."
    )
    trust_remote_code: Flag = execution(False, "Run the Python code that comes with the model.")


class Lora(Section):
    """The adapter that is trained on the frozen base."""

    enabled: Flag = recipe(True, "Train an adapter; false trains every weight of the model.")
    r: Natural = recipe(128, "Rank of the adapter.")
    alpha: Positive = recipe(256, "Strength of the adapter; its effective scale is alpha / r.")
    use_rslora: Flag = recipe(False, "Scale by alpha / sqrt(r) instead (rsLoRA); alpha is another one then.")
    use_dora: Flag = recipe(False, "DoRA: train the length of each row of a weight apart from its direction.")
    init: FirstWeights = recipe(
        "default", "How a fresh adapter is drawn; always so that it says nothing yet, and the base stays as it is."
    )
    dropout: Real = recipe(0.05, "Dropout before the adapter.", ge=0, lt=1)
    target_modules: Literal["auto"] | Annotated[tuple[Text, ...], Field(min_length=1)] = recipe(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Linear layers that get an adapter; auto takes all of them but the head.",
    )

    @property
    def scale(self) -> float:
        """What the product of its two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Data(Section):
    """How documents become rows of training."""

    text_field: Text = recipe(
        "auto",
        "Field that holds the text; auto looks for training_content, text, messages, instruction, in that order.",
    )
    where: dict[str, JsonValue] = recipe({}, "Keep only the records whose fields have these values.")
    max_tokens: Whole = recipe(32768, "Length of a training row, in tokens.", ge=2, le=2**24)
    overlap_tokens: Whole = recipe(
        2048, "Tokens that a window of a long document repeats as context; if not given, at most max_tokens / 16.", ge=0
    )
    overlap_loss: Literal["mask", "count"] = recipe("mask", "Repeated tokens are context only, or are trained again.")
    chunk_long_samples: Flag = recipe(True, "Cut long documents into windows; false keeps only their first max_tokens.")
    packing: Literal["best_fit", "concat", "pad", "none"] = recipe(
        "best_fit", "How documents fill rows: best_fit cuts nothing that fits, concat drops the rest, pad fills it up."
    )
    temperature: Real = recipe(
        1.0,
        "Shares of a phase's sources go with (weight × tokens)^(1 / temperature); above 1 evens them out.",
        gt=0,
        le=100,
    )
    max_repeats: Positive = bookkeeping(
        4.0, "Most passes over a source that replay, or temperature, may come to in a phase."
    )
    shuffle: Flag = recipe(True, "Shuffle the rows of each epoch; false keeps the order of the sources.")
    eval_share: Real = recipe(0.05, "Share of each source's documents that is held out.", ge=0, lt=1)
    eval_max_tokens: Natural = recipe(
        2_000_000, "Most tokens that are held out of a source; one document is, however long it is."
    )
    split_seed: Whole = recipe(0, "Seed of the split; apart from run.seed, so that runs share a held-out set.", ge=0)
    assistant_only_loss: Flag = recipe(False, "In chat data, train and measure only what the assistant says.")
    parse_special_tokens: Flag = recipe(False, "Read <|endoftext|> and its like inside a text as special tokens.")
    tokenizer_backend: Literal["auto", "gigatoken", "fastokens", "tokenizers"] = bookkeeping(
        "auto", "Library that tokenises; auto takes a fast one where it is proven equal."
    )
    isolate_documents: Flag = execution(
        True, "Stop where the attention in use lets documents of a row see each other; false goes on."
    )
    on_bad_record: Literal["fail", "skip"] = recipe("fail", "What a line that cannot be read does.")
    max_bad_share: Real = bookkeeping(0.01, "Largest share of bad lines that skip accepts.", ge=0, le=1)
    max_line_bytes: Size = recipe(256 * 2**20, "Longest line of a file that is read; a longer one is bad.")


class Training(Section):
    """How a phase is trained."""

    micro_batch_size: Natural = execution(1, "Rows a GPU holds at once.")
    gradient_accumulation_steps: Natural = execution(6, "Micro batches of a GPU in an optimizer step.")
    global_batch_size: Natural | None = recipe(
        None, "Rows in an optimizer step over all GPUs; the accumulation then follows from the number of GPUs."
    )
    learning_rate: Real = recipe(1e-4, "Peak learning rate.", gt=0, le=1)
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd", "infinite"] = recipe(
        "cosine", "Shape of the learning rate; each phase warms up anew, but infinite goes on where it was."
    )
    warmup_ratio: Real = recipe(0.03, "Share of the phase's steps that warm up.", ge=0, lt=1)
    warmup_steps: Count | None = recipe(None, "Steps of warm-up; if given, warmup_ratio is not used.")
    decay_ratio: Real = recipe(
        0.2,
        "Share of the phase's steps in which wsd cools down in the end, and the last infinite in a row.",
        gt=0,
        le=1,
    )
    cooldown_ratio: Real = recipe(
        0.1, "Share of the phase's steps in which the first infinite in a row falls to its constant rate.", ge=0, lt=1
    )
    constant_ratio: Real = recipe(0.5, "That constant rate of infinite, as a share of the peak.", gt=0, le=1)
    min_lr_ratio: Real = recipe(0.0, "Learning rate at the end, as a share of the peak.", ge=0, le=1)
    lora_plus_ratio: Positive | None = recipe(
        None, "LoRA+: the adapter's B learns at so many times the learning rate; null as fast as A."
    )
    optimizer: Text = recipe("adamw_torch_fused", "Optimizer, by the name that the Trainer knows it by.")
    optimizer_at_start: Literal["reset", "carry"] = recipe(
        "reset", "What the optimizer knows when a phase begins: nothing, or what it knew at the end of the one before."
    )
    weight_decay: Real = recipe(0.1, "Weight decay.", ge=0)
    max_grad_norm: Positive | None = recipe(1.0, "Gradients are clipped to this norm; null clips nothing.")
    gradient_checkpointing: Flag = execution(True, "Compute activations twice instead of keeping them.")
    loss: Literal["auto", "chunked", "liger", "plain"] = execution(
        "auto", "How the loss is computed: the same numbers, with more or less memory."
    )
    deepspeed: Place = execution(
        "auto", "DeepSpeed file: auto, the name of a shipped one (see deepspeed_configs/), or a path."
    )


class Source(Section):
    """Documents: a file, a folder, a glob, or a data set of the hub."""

    path: Place = bookkeeping(..., "File, folder or glob, seen from where the command is called; or a hub id.")
    split: Text | None = recipe(None, "Split of a hub data set.")
    weight: Positive = recipe(
        1.0, "How often its training documents are seen in an epoch; 0.5 is half of them.", le=1000
    )


SourceOrPath = Annotated[Source, BeforeValidator(path_as_source, json_schema_input_type=Source | str)]
Sources = Annotated[
    tuple[SourceOrPath, ...],
    BeforeValidator(one_or_many, json_schema_input_type=tuple[SourceOrPath, ...] | Source | str),
]


class Evaluation(Section):
    """What is measured on the held-out documents, and when."""

    every_steps: Natural = recipe(50, "Optimizer steps between evaluations; the end of an epoch is always one.")
    micro_batch_size: Natural = execution(1, "Rows a GPU evaluates at once.")
    publish: Literal["best", "last"] = recipe(
        "best", "Adapter that the next phase starts from: of the best loss, or the last."
    )
    patience: Natural | None = recipe(None, "Stop a phase after so many evaluations without a better loss.")
    cooldown_ratio: Real = recipe(
        0.1,
        "Share of the steps done in which a phase out of patience lowers its rate before it stops; 0 stops at once.",
        ge=0,
        le=1,
    )
    best_of: dict[Text, Positive] = recipe(
        {}, "Weights of held-out sets by whose mean loss the best is chosen ({evolution: 0.5, foundation: 0.5})."
    )
    matrix: Literal["every_phase", "end", "off"] = bookkeeping(
        "every_phase", "When the held-out documents of every phase are measured; before phase 1 as well, unless off."
    )
    general: dict[Annotated[str, Field(pattern=PHASE_NAME)], Sources] = bookkeeping(
        {}, "Sets that are never trained and measured beside the phases' own, by name: {wiki: wiki.jsonl}."
    )
    samples: Count = bookkeeping(3, "Held-out prompts that the base and each phase continue, for the report.")


class Gate(Section):
    """What a phase must hold to be published, in nats a token: on its held-out documents and on earlier ones."""

    max_forgetting: NotNegative | None = bookkeeping(
        None, "Most that the loss of any earlier phase or general set may stand above its best so far."
    )
    min_gain: Nats | None = bookkeeping(None, "Least by which the phase's own held-out loss must have fallen.")
    on_fail: Literal["stop", "warn", "retry_with_replay"] = bookkeeping(
        "stop", "When it fails: stop the run, publish it all the same, or train it again with replay."
    )
    replay: Share = bookkeeping(0.05, "Share of earlier phases in that second try.")


class Checkpoint(Section):
    """What is kept so that a stop loses little."""

    every_steps: Natural = bookkeeping(50, "Optimizer steps between checkpoints.")
    keep: Natural = bookkeeping(3, "Newest checkpoints that are kept, besides the best weights.")
    keep_published: Flag = bookkeeping(False, "Keep the checkpoints of a phase that is published.")


class Wandb(Section):
    """Weights & Biases; the key comes from WANDB_API_KEY."""

    enabled: Flag = bookkeeping(False, "Log to Weights & Biases.")
    project: Text = bookkeeping("phased-cpt", "Project there.")
    entity: Text | None = bookkeeping(None, "Team or user there.")
    mode: Literal["auto", "online", "offline"] = bookkeeping("auto", "auto is online where a key is set, else offline.")


class Tensorboard(Section):
    """TensorBoard files under the run folder."""

    enabled: Flag = bookkeeping(True, "Write TensorBoard files.")


class Tracking(Section):
    """Where the figures go, besides the JSONL files that are always written."""

    wandb: Wandb = bookkeeping(Wandb(), "Weights & Biases.")
    tensorboard: Tensorboard = bookkeeping(Tensorboard(), "TensorBoard.")


class Merge(Section):
    """The plain model that is written after the last phase."""

    enabled: Flag = bookkeeping(True, "Merge the last adapter into the base when the run is done.")
    output_dir: Place = bookkeeping("merged_model", "Where to; relative to the run folder.")
    max_shard_size: Size = bookkeeping(2_000_000_000, "Largest file of the merged model.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = bookkeeping("auto", "Its number format; auto is model.precision.")
    base: Literal["auto", "bf16", "dequantized"] = bookkeeping(
        "auto",
        "After QLoRA: merge into the 16-bit base, or into what 4 bits left of it; auto measures both.",
    )


class Launch(Section):
    """The machines that the phases are launched on."""

    num_gpus: Natural | None = execution(
        None, "Processes in a phase on each machine, one per GPU; every visible GPU if absent."
    )
    nnodes: Natural = execution(1, "Machines (nodes); the same command is called on each, with its --node-rank.")
    master_addr: Text | None = bookkeeping(None, "Name or address of node 0, as the other nodes reach it.")
    master_port: Natural = bookkeeping(29400, "Port there at which the nodes meet.", le=65535)
    hostfile: Place | None = bookkeeping(
        None, "File of the machines, a line each (worker-1 slots=8); all but the first are called by ssh."
    )
    launcher: Literal["local", "deepspeed", "torchrun", "inline"] = bookkeeping(
        "local", "How the processes of a phase are started: directly, by a launcher, or as the one that is called."
    )
    hang_minutes: Positive = bookkeeping(30.0, "Minutes without any progress after which the processes are ended.")
    retries: Count = bookkeeping(
        0, "How often a failed phase is started again by `phased-cpt run`; only if a checkpoint was made since."
    )

    @property
    def ranks(self) -> int | None:
        """Of a phase, where that is written: of several machines each may have its own number."""
        return self.num_gpus if self.nnodes == 1 and self.hostfile is None else None


class Phase(Section):
    """One training stretch of the curriculum; it starts from what the one before published."""

    name: str = recipe(..., "Name of the phase, unlike every other in the run.", pattern=PHASE_NAME, max_length=64)
    description: str = bookkeeping("", "What it is to teach.")
    sources: Sources = recipe(..., "Where its documents come from.", min_length=1)
    eval_sources: Sources = recipe((), "Held-out documents of their own, instead of a share of the sources.")
    max_steps: Natural | None = recipe(None, "Budget in optimizer steps; if given, tokens and epochs are not used.")
    tokens: Natural | None = recipe(None, "Budget in trained tokens; if given, epochs is not used.")
    epochs: Positive = recipe(1.0, "Budget in passes over the sources.")
    handover: Literal["continue", "merge", "stack"] = recipe(
        "continue",
        "How the next phase starts: with this adapter, with a fresh one on a base that has this one merged, or with "
        "a fresh one on top of this one, which is frozen.",
    )
    gate: Gate | None = bookkeeping(None, "What the phase must hold to be published.")
    replay: dict[str, Share] | Share | None = recipe(
        None, "Share of this phase's tokens drawn from earlier phases: of all of them, or by name ({foundation: 0.05})."
    )
    lora: Lora | None = recipe(None, "Adapter of this phase, where it starts a fresh one.")
    data: Data | None = recipe(None, "Values of `data` for this phase alone.")
    training: Training | None = recipe(None, "Values of `training` for this phase alone.")
    evaluation: Evaluation | None = recipe(None, "Values of `evaluation` for this phase alone.")


def default_phases() -> tuple[Phase, ...]:
    """The curriculum of a repository: its files, then its commits, then its reviews."""
    return (
        Phase(name="foundation", description="what the code is", sources=_jsonl("phase1_foundation"), epochs=3),
        Phase(name="evolution", description="how the code changes", sources=_jsonl("phase2_evolution"), epochs=2),
        Phase(name="pr_mastery", description="how changes are judged", sources=_jsonl("phase3_pr_mastery"), epochs=2),
    )


def _jsonl(stem: str) -> tuple[Source, ...]:
    return (Source(path=f"dataset/{stem}.jsonl"),)


class RunConfig(Section):
    """A run of phased_cpt: a base model, and the phases that teach it."""

    run: Run = bookkeeping(Run(), "What this run is called and where it writes.")
    model: Model = recipe(Model(), "The base model.")
    lora: Lora = recipe(Lora(), "The adapter.")
    data: Data = recipe(Data(), "How documents become rows.")
    training: Training = recipe(Training(), "How a phase is trained.")
    evaluation: Evaluation = recipe(Evaluation(), "What is measured, and when.")
    tracking: Tracking = bookkeeping(Tracking(), "Where the figures go.")
    checkpoint: Checkpoint = bookkeeping(Checkpoint(), "What is kept.")
    merge: Merge = bookkeeping(Merge(), "The merged model.")
    launch: Launch = execution(Launch(), "The machine.")
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = recipe(default_phases(), "The curriculum, in order.")
