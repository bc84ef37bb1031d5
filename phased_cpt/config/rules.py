"""The rules across fields: what a single key cannot know. Each yields its problems; to add one, write it and list it.

A message names the keys that it compares, so that a rule about a value which is refused anyway is not reported too.
"""

import re
from collections.abc import Callable, Iterator

from phased_cpt.config.allowed import nearest
from phased_cpt.config.inherit import Settings, settings_of, starts_fresh
from phased_cpt.config.read import Keys
from phased_cpt.config.schema import Phase, RunConfig
from phased_cpt.config.shipped import shipped_names

Found = Iterator[tuple[Keys, str]]
Rule = Callable[[RunConfig], Found]


def each_phase(config: RunConfig) -> Iterator[tuple[int, Phase, Settings]]:
    for index, phase in enumerate(config.phases):
        yield index, phase, settings_of(config, phase)


def a_base_is_named(config: RunConfig) -> Found:
    if config.model.name is None and config.model.from_config is None:
        yield (
            ("model", "name"),
            "nothing given; needed: a hub id or a folder (or model.from_config, for a random start)",
        )


def one_base_only(config: RunConfig) -> Found:
    if config.model.name is not None and config.model.from_config is not None:
        yield (
            ("model", "from_config"),
            "given beside model.name; a model is loaded by name or begun from a config, so take one of them out",
        )


def remote_code_is_pinned(config: RunConfig) -> Found:
    pinned = re.fullmatch(r"[0-9a-f]{40}", config.model.revision or "")
    if config.model.trust_remote_code and not pinned and not _is_folder_path(config.model.name or ""):
        yield (
            ("model", "trust_remote_code"),
            "given true without a pinned model.revision; set it to the whole commit (40 digits) that you have read",
        )


def phase_names_differ(config: RunConfig) -> Found:
    first: dict[str, str] = {}
    for index, phase in enumerate(config.phases):
        other = first.setdefault(phase.name.lower(), phase.name)
        if index and (other != phase.name or phase.name in [p.name for p in config.phases[:index]]):
            yield (
                ("phases", index, "name"),
                f"given {phase.name!r}, and an earlier phase is called {other!r}; names must differ in more than case",
            )


def overlap_fits_the_window(config: RunConfig) -> Found:
    for index, _, at in each_phase(config):
        if at.data.overlap_tokens >= at.data.max_tokens:
            yield (
                ("phases", index, "data", "overlap_tokens"),
                f"overlap_tokens is {at.data.overlap_tokens} and max_tokens {at.data.max_tokens}; "
                f"a window must move on: overlap_tokens below max_tokens (max_tokens / 16 is usual)",
            )


def warmup_fits_the_phase(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        steps, warmup = phase.max_steps, at.training.warmup_steps
        if steps and warmup is not None and warmup >= steps:
            yield (
                ("phases", index, "training", "warmup_steps"),
                f"warmup_steps is {warmup} and max_steps {steps}; the warm-up must end before the phase does",
            )


def warmup_and_decay_fit(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        if at.training.lr_scheduler != "wsd":
            continue
        warmup, key = at.training.warmup_ratio, "warmup_ratio"
        if at.training.warmup_steps is not None:
            warmup, key = (at.training.warmup_steps / phase.max_steps if phase.max_steps else 0.0), "warmup_steps"
        if warmup + at.training.decay_ratio > 1:
            yield (
                ("phases", index, "training", "decay_ratio"),
                f"{key} and decay_ratio {at.training.decay_ratio:g} together take more than the whole phase; lower one",
            )


def four_bits_store_as_zero3_needs(config: RunConfig) -> Found:
    model = config.model
    storage = model.precision if model.bnb_4bit_quant_storage == "auto" else model.bnb_4bit_quant_storage
    for index, _, at in each_phase(config):
        zero3 = "zero3" in at.training.deepspeed.rpartition("/")[2]
        if model.use_4bit and zero3 and storage != model.precision:
            yield (
                ("phases", index, "training", "deepspeed"),
                f"ZeRO-3 shards 4-bit weights only as bnb_4bit_quant_storage = precision; given {storage} and "
                f"{model.precision}; leave bnb_4bit_quant_storage at auto, or use deepspeed: zero2",
            )


def four_bits_are_frozen(config: RunConfig) -> Found:
    for index, _, at in each_phase(config):
        if config.model.use_4bit and not at.lora.enabled:
            yield (
                ("phases", index, "lora", "enabled"),
                "lora.enabled is false and use_4bit true, but 4-bit weights stay frozen; change one of the two",
            )


def deepspeed_file_is_known(config: RunConfig) -> Found:
    known = ["auto", *shipped_names("deepspeed_configs")]
    for index, _, at in each_phase(config):
        if at.training.deepspeed not in known and not at.training.deepspeed.endswith(".json"):
            yield (
                ("phases", index, "training", "deepspeed"),
                f"deepspeed is {at.training.deepspeed!r}; allowed: {', '.join(known)}, or the path of a .json file"
                + nearest(at.training.deepspeed, known),
            )


def batch_divides(config: RunConfig) -> Found:
    gpus = config.launch.num_gpus
    for index, _, at in each_phase(config):
        whole, part = at.training.global_batch_size, at.training.micro_batch_size * (gpus or 1)
        if whole and whole % part:
            over = f"micro_batch_size {at.training.micro_batch_size}" + (f" × num_gpus {gpus}" if gpus else "")
            yield (
                ("phases", index, "training", "global_batch_size"),
                f"global_batch_size {whole} is no multiple of {over}; the nearest are {part * (whole // part) or part} "
                f"and {part * (whole // part + 1)}",
            )


def continued_adapters_keep_their_shape(config: RunConfig) -> Found:
    """An adapter that goes on has the rank and the targets it was born with; only its dropout is free."""
    for index, _, at in each_phase(config):
        if not index or starts_fresh(config, index) or not at.lora.enabled:
            continue
        giver = config.phases[index - 1]
        before = settings_of(config, giver).lora
        for key in ("r", "alpha", "target_modules"):
            own, inherited = getattr(at.lora, key), getattr(before, key)
            if own != inherited:
                yield (
                    ("phases", index, "lora", key),
                    f"lora.{key} is {own}, but this phase goes on with {giver.name}'s adapter, which has {inherited}; "
                    f"take it out, or end {giver.name} with `handover: merge`",
                )


def full_training_starts_from_a_base(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        if at.lora.enabled or (starts_fresh(config, index)):
            continue
        giver = f"{config.phases[index - 1].name} with `handover: merge`" if index else "without model.adapter"
        yield (
            ("phases", index, "lora", "enabled"),
            f"lora.enabled is false, and {phase.name} is to go on with an adapter; begin it from a base: {giver}",
        )


def assistant_loss_needs_messages(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        if not at.data.assistant_only_loss:
            continue
        raw = [s.path for s in phase.sources if s.path.removesuffix(".gz").removesuffix(".zst").endswith(".txt")]
        if at.data.text_field not in ("auto", "messages") or raw:
            what = f"{raw[0]} is" if raw else f"text_field {at.data.text_field!r} is"
            yield (
                ("phases", index, "data", "assistant_only_loss"),
                f"assistant_only_loss needs chat data, and {what} raw text; set text_field: messages, or take it out",
            )


def replay_draws_from_earlier_phases(config: RunConfig) -> Found:
    for index, phase in enumerate(config.phases):
        earlier = [p.name for p in config.phases[:index]]
        if phase.replay is not None and not earlier:
            yield (
                ("phases", index, "replay"),
                f"{phase.name} is the first phase: there is nothing to replay; take it out",
            )
        elif isinstance(phase.replay, dict):
            for name in phase.replay:
                if name not in earlier:
                    yield (
                        ("phases", index, "replay", name),
                        f"no phase before {phase.name} is called {name!r}; allowed: {', '.join(earlier)}",
                    )
            if sum(phase.replay.values()) >= 1:
                yield (
                    ("phases", index, "replay"),
                    "the shares of replay leave nothing for the phase itself; their sum must be below 1",
                )


def patience_needs_held_out_documents(config: RunConfig) -> Found:
    for index, phase, at in each_phase(config):
        if at.evaluation.patience and not at.data.eval_share and not phase.eval_sources:
            yield (
                ("phases", index, "evaluation", "patience"),
                "patience needs held-out documents, and eval_share is 0; raise eval_share or give eval_sources",
            )


def _is_folder_path(name: str) -> bool:
    return name.startswith((".", "/", "~"))


RULES: tuple[Rule, ...] = (
    a_base_is_named,
    one_base_only,
    remote_code_is_pinned,
    phase_names_differ,
    overlap_fits_the_window,
    warmup_fits_the_phase,
    warmup_and_decay_fit,
    four_bits_store_as_zero3_needs,
    four_bits_are_frozen,
    deepspeed_file_is_known,
    batch_divides,
    continued_adapters_keep_their_shape,
    full_training_starts_from_a_base,
    assistant_loss_needs_messages,
    replay_draws_from_earlier_phases,
    patience_needs_held_out_documents,
)
