"""The rules across fields: what a single key cannot know. To add one, write it below another.

A rule says which keys it compares, the one to change first. It is silent where one of them was refused already, and its
message is placed at the first of them that was written.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from phased_cpt.config.allowed import nearest
from phased_cpt.config.inherit import Settings, settings_of_phases
from phased_cpt.config.schema import Phase, RunConfig
from phased_cpt.config.shipped import shipped_names
from phased_cpt.run_dir import OWN_NAMES, is_phase_folder

RSLORA_SCALE = 8

# The index of the phase, or None for the run; what is wrong and what would be right.
Found = Iterator[tuple[int | None, str]]


@dataclass(frozen=True)
class Rule:
    """A check and the keys that it compares: `section.key`, or `phase.key` for a key of the phase itself."""

    compares: tuple[str, ...]
    check: Callable[[RunConfig], Found]


RULES: list[Rule] = []


def rule(*compares: str) -> Callable[[Callable[[RunConfig], Found]], Callable[[RunConfig], Found]]:
    def add(check: Callable[[RunConfig], Found]) -> Callable[[RunConfig], Found]:
        RULES.append(Rule(compares, check))
        return check

    return add


def each_phase(config: RunConfig) -> Iterator[tuple[int, Phase, Settings]]:
    for index, at in enumerate(settings_of_phases(config)):
        yield index, config.phases[index], at


@rule("model.name", "model.from_config")
def a_base_is_named(config: RunConfig) -> Found:
    if config.model.name is None and config.model.from_config is None:
        yield None, "nothing given; needed: a hub id or a folder (or model.from_config, for a random start)"


@rule("model.from_config", "model.name")
def one_base_only(config: RunConfig) -> Found:
    if config.model.name is not None and config.model.from_config is not None:
        yield None, "given beside model.name; a model is loaded by name or begun from a config, so take one of them out"


@rule("model.trust_remote_code", "model.revision", "model.name")
def remote_code_is_pinned(config: RunConfig) -> Found:
    pinned = re.fullmatch(r"[0-9a-f]{40}", config.model.revision or "")
    if config.model.trust_remote_code and not pinned and not (config.model.name or "").startswith((".", "/", "~")):
        what = "given true without a pinned model.revision; set it to the whole commit (40 digits) that you have read"
        yield None, f"{what} (a folder is written ./like/this)"


@rule("phase.name")
def phase_names_differ(config: RunConfig) -> Found:
    first: dict[str, str] = {}
    for index, phase in enumerate(config.phases):
        if phase.name.lower() in first:
            other = first[phase.name.lower()]
            yield index, f"given {phase.name!r}, but an earlier phase is called {other!r}; give it another name"
        first.setdefault(phase.name.lower(), phase.name)


@rule("data.overlap_tokens", "data.max_tokens", "data.chunk_long_samples", "data.packing")
def overlap_fits_the_window(config: RunConfig) -> Found:
    for index, _, at in each_phase(config):
        nothing_is_cut = not at.data.chunk_long_samples and at.data.packing in ("best_fit", "none")
        if at.data.overlap_tokens >= at.data.max_tokens and not nothing_is_cut:
            what = f"overlap_tokens is {at.data.overlap_tokens} and max_tokens {at.data.max_tokens}"
            yield index, f"{what}; a window must move on: overlap_tokens below max_tokens (max_tokens / 16 is usual)"


@rule("training.warmup_steps", "phase.max_steps")
def warmup_fits_the_phase(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        warmup = at.training.warmup_steps
        if phase.max_steps and warmup is not None and warmup >= phase.max_steps and at.warms_up:
            what = f"warmup_steps is {warmup} and max_steps {phase.max_steps}"
            yield index, f"{what}; the warm-up must end before the phase does"


@rule(
    "training.decay_ratio",
    "training.warmup_ratio",
    "training.warmup_steps",
    "training.cooldown_ratio",
    "training.lr_scheduler",
    "phase.max_steps",
)
def warmup_and_decay_fit(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        warmup, key = at.training.warmup_ratio, "warmup_ratio"
        if at.training.warmup_steps is not None:
            warmup, key = (at.training.warmup_steps / phase.max_steps if phase.max_steps else 0.0), "warmup_steps"
        infinite = at.training.lr_scheduler == "infinite"
        shares = {key: warmup} if at.warms_up else {}
        shares |= {"cooldown_ratio": at.training.cooldown_ratio} if infinite and at.warms_up else {}
        shares |= {"decay_ratio": at.training.decay_ratio} if at.anneals else {}
        if (infinite or at.training.lr_scheduler == "wsd") and sum(shares.values()) > 1:
            *first, last = shares
            last += f" {shares[last]:g}"
            yield index, f"{', '.join(first)} and {last} together take more than the whole phase; lower one"


@rule("training.constant_ratio", "training.min_lr_ratio", "training.lr_scheduler")
def infinite_never_rises_again(config: RunConfig) -> Found:
    for index, _, at in each_phase(config):
        constant, least = at.training.constant_ratio, at.training.min_lr_ratio
        if at.training.lr_scheduler == "infinite" and constant < least:
            yield index, f"constant_ratio is {constant:g} and min_lr_ratio {least:g}; the end must not lie above it"


@rule("training.learning_rate", "training.constant_ratio", "training.lr_scheduler", "phase.handover")
def infinite_goes_on_at_its_rate(config: RunConfig) -> Found:
    rates = [at.training.learning_rate * at.training.constant_ratio for _, _, at in each_phase(config)]
    for index, _, at in each_phase(config):
        if not at.warms_up and not math.isclose(rates[index], rates[index - 1]):
            what = f"infinite goes on at {rates[index]:g} (learning_rate × constant_ratio) after {rates[index - 1]:g}"
            yield index, f"{what} in {config.phases[index - 1].name}; make them equal, or take another lr_scheduler"


@rule("model.from_config", "model.adapter")
def an_adapter_needs_its_base(config: RunConfig) -> Found:
    if config.model.from_config is not None and config.model.adapter is not None:
        yield None, "given beside model.adapter; an adapter fits the base it was trained on, not random weights"


@rule("data.max_tokens", "model.from_config")
def rows_fit_the_positions(config: RunConfig) -> Found:
    given = config.model.from_config if isinstance(config.model.from_config, dict) else {}
    positions = given.get("max_position_embeddings")
    rope = given.get("rope_parameters") or given.get("rope_scaling")
    stretched = isinstance(rope, dict) and rope.get("rope_type", "default") != "default"
    for index, _, at in each_phase(config):
        if isinstance(positions, int) and at.data.max_tokens > positions and not stretched:
            what = f"max_tokens is {at.data.max_tokens}, and from_config has max_position_embeddings {positions}"
            yield index, f"{what}; max_tokens at most {positions}, or another rope_type in from_config.rope_parameters"


@rule("training.deepspeed", "model.use_4bit", "model.bnb_4bit_quant_storage", "model.precision")
def four_bits_store_as_zero3_needs(config: RunConfig) -> Found:
    model = config.model
    storage = model.precision if model.bnb_4bit_quant_storage == "auto" else model.bnb_4bit_quant_storage
    for index, _, at in each_phase(config):
        may_shard = at.training.deepspeed not in ("zero2", "zero2_offload")  # auto and a file of one's own may, too
        if model.use_4bit and may_shard and storage != model.precision:
            what = f"ZeRO-3 shards 4-bit weights only as bnb_4bit_quant_storage = precision, not {storage} beside"
            yield index, f"{what} {model.precision}; leave bnb_4bit_quant_storage at auto, or use deepspeed: zero2"


@rule("lora.enabled", "model.use_4bit")
def four_bits_are_frozen(config: RunConfig) -> Found:
    for index, _, at in each_phase(config):
        if config.model.use_4bit and not at.lora.enabled:
            yield index, "lora.enabled is false and use_4bit true, but 4-bit weights stay frozen; change one of the two"


@rule("training.deepspeed")
def deepspeed_file_is_known(config: RunConfig) -> Found:
    known = ["auto", *shipped_names("deepspeed_configs")]
    for index, _, at in each_phase(config):
        given = at.training.deepspeed
        if given not in known and not given.endswith(".json"):
            allowed = f"{', '.join(known)}, or the path of a .json file"
            yield index, f"given {given!r}; allowed: {allowed}{nearest(given, known)}"


@rule("training.global_batch_size", "training.micro_batch_size", "launch.num_gpus")
def batch_divides(config: RunConfig) -> Found:
    gpus = config.launch.ranks
    for index, _, at in each_phase(config):
        rows, at_once = at.training.global_batch_size, at.training.micro_batch_size * (gpus or 1)
        if rows and rows % at_once:
            parts = f"micro_batch_size {at.training.micro_batch_size}" + (f" × num_gpus {gpus}" if gpus else "")
            near = [multiple for multiple in (rows - rows % at_once, rows - rows % at_once + at_once) if multiple]
            yield index, f"global_batch_size {rows} is no multiple of {parts}; near it: {' and '.join(map(str, near))}"


@rule("phase.lora", "phase.handover")
def continued_adapters_keep_their_shape(config: RunConfig) -> Found:
    """An adapter that goes on has the rank and the targets it was born with; only its dropout is free."""
    settings = settings_of_phases(config)
    for index, phase, at in each_phase(config):
        before = settings[index - 1].lora
        if at.born == index or not at.lora.enabled or phase.lora is None:
            continue
        for key in ("r", "alpha", "use_rslora", "use_dora", "init", "target_modules"):
            own, inherited = getattr(at.lora, key), getattr(before, key)
            if own != inherited and not (key == "target_modules" and set(own) == set(inherited)):
                giver = config.phases[index - 1].name
                what = f"lora.{key} is {own}, but this phase goes on with {giver}'s adapter, which has {inherited}"
                yield index, f"{what}; take it out, or end {giver} with `handover: merge` or `stack`"


@rule("lora.use_rslora", "lora.alpha", "lora.r")
def rslora_has_an_alpha_of_its_own(config: RunConfig) -> Found:
    """alpha = 2 r is 2 with LoRA's scale, and 2 sqrt(r) with that of rsLoRA: 32 at r = 256."""
    for index, _, at in each_phase(config):
        if at.lora.enabled and at.lora.use_rslora and at.lora.scale > RSLORA_SCALE:
            what = f"use_rslora scales by alpha / sqrt(r), which is {at.lora.scale:.3g} here (alpha / r: "
            mend = f"lora.alpha: {2 * math.sqrt(at.lora.r):.3g} makes it the usual 2"
            yield index, f"{what}{at.lora.alpha / at.lora.r:.3g}) and above {RSLORA_SCALE}; {mend}"


@rule("lora.init", "lora.r", "model.use_4bit")
def orthogonal_weights_can_be_drawn(config: RunConfig) -> Found:
    for index, _, at in each_phase(config):
        if at.lora.enabled and at.lora.init == "orthogonal" and (at.lora.r % 2 or config.model.use_4bit):
            rank = f"an even rank, and lora.r is {at.lora.r}"
            needed = "16-bit weights (model.use_4bit)" if config.model.use_4bit else rank
            yield index, f"orthogonal needs {needed}; default and gaussian do not"


@rule("lora.use_dora", "phase.handover")
def dora_stands_alone(config: RunConfig) -> Found:
    """Its lengths are those of all that lies below it, so that what lies below must be one weight."""
    settings = settings_of_phases(config)
    for index, _, at in each_phase(config):
        if at.stacked and (at.lora.use_dora or settings[index - 1].lora.use_dora):
            giver = config.phases[index - 1].name
            yield index, f"DoRA cannot be one of several adapters; end {giver} with `handover: merge`, not stack"


@rule("lora.enabled", "model.adapter", "phase.handover")
def full_training_starts_from_a_base(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        if not at.lora.enabled and not at.from_base:
            base = f"end {config.phases[index - 1].name} with `handover: merge`" if index else "take model.adapter out"
            what = f"lora.enabled is false, but {phase.name} is to go on with an adapter"
            yield index, f"{what}; to begin from a base, {base}"


@rule("data.assistant_only_loss", "data.text_field", "phase.sources")
def assistant_loss_needs_messages(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        raw = [source.path for source in phase.sources if re.search(r"\.txt(\.gz|\.zst)?$", source.path.lower())]
        raw_field = at.data.text_field in ("text", "training_content")
        if at.data.assistant_only_loss and (raw or raw_field):
            what = f"{raw[0]} is raw text" if raw else f"text_field {at.data.text_field} is raw text"
            yield index, f"assistant_only_loss needs chat data, and {what}; set text_field: messages, or take it out"


@rule("phase.replay", "phase.name")
def replay_draws_from_earlier_phases(config: RunConfig) -> Found:
    for index, phase in enumerate(config.phases):
        earlier = [before.name for before in config.phases[:index]]
        shares = phase.replay if isinstance(phase.replay, dict) else {}
        if phase.replay is not None and not earlier:
            yield index, f"{phase.name} is the first phase: there is nothing to replay; take it out"
        elif unknown := [name for name in shares if name not in earlier]:
            hint = nearest(unknown[0], earlier)
            yield index, f"no phase before {phase.name} is called {unknown[0]!r}; allowed: {', '.join(earlier)}{hint}"
        elif sum(shares.values()) >= 1:
            yield index, "the shares of replay leave nothing for the phase itself; their sum must be below 1"


@rule("evaluation.patience", "data.eval_share", "phase.eval_sources")
def patience_needs_held_out_documents(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        if at.evaluation.patience and not at.data.eval_share and not phase.eval_sources:
            yield index, "patience needs held-out documents, and eval_share is 0; raise it, or give eval_sources"


@rule("training.optimizer_at_start", "phase.handover", "lora.enabled", "training.optimizer", "evaluation.publish")
def an_optimizer_is_carried_to_the_same_weights(config: RunConfig) -> Found:
    settings = settings_of_phases(config)
    for index, phase, at in each_phase(config):
        if at.training.optimizer_at_start != "carry" or (not index and "training" not in phase.model_fields_set):
            continue  # of a run that carries, the first phase has nothing to begin with
        before = settings[index - 1] if index else None
        giver = config.phases[index - 1].name if index else ""
        if before is None:
            yield index, f"optimizer_at_start is carry, and nothing comes before {phase.name}; take it out"
        elif at.lora.enabled != before.lora.enabled or at.stacked or (at.lora.enabled and at.from_base):
            what = f"optimizer_at_start is carry, but {phase.name} does not go on with the weights that {giver} trains"
            yield index, f"{what}; take it out, or end {giver} with `handover: continue`"
        elif at.training.optimizer != before.training.optimizer:
            what = f"optimizer_at_start is carry, from {before.training.optimizer} to {at.training.optimizer}"
            yield index, f"{what}; give both phases the same optimizer"
        elif before.evaluation.publish != "last":
            what = f"optimizer_at_start is carry, and {giver} may publish weights from before its end"
            yield index, f"{what}; set evaluation.publish: last there"


@rule("evaluation.general", "phase.name")
def general_sets_have_names_of_their_own(config: RunConfig) -> Found:
    names = {phase.name.lower(): phase.name for phase in config.phases}
    for name in config.evaluation.general:
        if name.lower() in names:
            yield None, f"{name} is a phase, whose held-out documents are measured anyway; give the set another name"
    for index, phase in enumerate(config.phases):
        if phase.evaluation is not None and "general" in phase.evaluation.model_fields_set:
            yield index, "general sets are measured after every phase; name them in the run's own evaluation"


@rule("evaluation.best_of", "phase.name", "evaluation.general")
def best_is_chosen_by_what_is_measured(config: RunConfig) -> Found:
    for index, _, at in each_phase(config):
        known = [*(phase.name for phase in config.phases[: index + 1]), *config.evaluation.general]
        if unknown := [name for name in at.evaluation.best_of if name not in known]:
            hint = nearest(unknown[0], known)
            what = f"best_of names {unknown[0]!r}, which is neither this phase nor an earlier one, nor a general set"
            yield index, f"{what}; allowed: {', '.join(known)}{hint}"


def _holds_out(config: RunConfig, settings: Sequence[Settings]) -> bool:
    pairs = zip(config.phases, settings, strict=False)
    return any(at.data.eval_share or phase.eval_sources for phase, at in pairs)


@rule("phase.gate", "evaluation.matrix", "data.eval_share", "phase.eval_sources")
def gates_judge_what_is_measured(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        gate, before = phase.gate, settings_of_phases(config)[: index + 1]
        if gate is None:
            continue
        if gate.max_forgetting is None and gate.min_gain is None:
            yield index, "gate judges nothing; give max_forgetting, min_gain, or both"
        elif gate.max_forgetting is not None and not index and not config.evaluation.general:
            yield index, "gate.max_forgetting: nothing comes before the first phase; give it to a later one"
        elif gate.max_forgetting is not None and any(each.evaluation.matrix != "every_phase" for each in before):
            yield index, "gate.max_forgetting needs evaluation.matrix: every_phase, up to this phase"
        elif gate.max_forgetting is not None and not config.evaluation.general and not _holds_out(config, before[:-1]):
            yield index, "gate.max_forgetting: no phase before it holds anything out; raise data.eval_share there"
        elif gate.min_gain is not None and not at.data.eval_share and not phase.eval_sources:
            yield index, "gate.min_gain needs held-out documents, and eval_share is 0; raise it, or give eval_sources"
        elif gate.on_fail == "retry_with_replay" and not index:
            yield index, f"gate.on_fail: retry_with_replay: nothing comes before {phase.name}; take stop or warn"


@rule("merge.output_dir")
def merged_model_has_a_place_of_its_own(config: RunConfig) -> Found:
    path = PurePosixPath(config.merge.output_dir)
    first = path.parts[0] if path.parts else ""
    taken = not first or ".." in path.parts or first in OWN_NAMES or is_phase_folder(first)
    if taken and not path.is_absolute():
        what = f"given {config.merge.output_dir!r}, which the run needs for itself"
        yield None, f"{what}; allowed: another name in the run folder, or an absolute path"
