"""The DeepSpeed file of a phase: chosen, read, held against the plan, and filled in before anything heavy is loaded.

What the others would do with an "auto", and why it is done here instead:
  transformers  fills the batch, the clipping and the precision from its arguments, and the sizes from the model, which
                must be loaded first; of an allgather_bucket_size it knows nothing
  accelerate    fills what is left, and stops at one that it does not know: at the allgather_bucket_size of our zero2;
                it adds bf16 and fp16, zero_allow_untested_optimizer and steps_per_print, and replaces the optimizer of
                an offloaded phase by DeepSpeedCPUAdam unless it is told not to
  deepspeed     drops an "auto" that is left in a block, without a word, and stumbles over one outside
A file that is filled leaves them nothing to decide, and stands in the record of the run as it holds.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phased_cpt.config.allowed import nearest
from phased_cpt.config.shipped import shipped_folder, shipped_names
from phased_cpt.errors import InputError
from phased_cpt.plan import PhasePlan

Content = dict[str, Any]

AUTO = "auto"
LONG_ROWS = 16_384  # tokens; the activations of longer ones need the memory that ZeRO-3 frees

_ABSENT = object()
_STAGE = "zero_optimization.stage"
_FORCED = "zero_force_ds_cpu_optimizer"

# What would decide beside the plan, or against it.
_REFUSED = {
    "optimizer": "the plan decides it: take it out, and use training.optimizer, learning_rate and weight_decay",
    "scheduler": "the plan decides it: take it out, and use training.lr_scheduler, warmup_ratio and min_lr_ratio",
    "bfloat16": "an old name, at which DeepSpeed does not look beside bf16: write it bf16",
    "sequence_parallel_size": "in the plan every rank has rows of its own, so ranks cannot share one: take it out",
    "tensor_parallel": "in the plan every rank has rows of its own, so ranks cannot share one: take it out",
}

_LOSS_SCALING = {  # DeepSpeed's own defaults, written out so that they are on record
    "fp16.loss_scale": 0,  # it finds the scale by itself
    "fp16.initial_scale_power": 16,
    "fp16.loss_scale_window": 1000,
    "fp16.hysteresis": 2,
    "fp16.min_loss_scale": 1,
}
_HABITS = {
    "steps_per_print": 10**9,  # never; accelerate makes an infinity of it, which is no number of JSON
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,  # it has tested a handful, and paged_adamw_8bit is none of them
}


@dataclass(frozen=True)
class ModelShape:
    """What the sizes of the buckets follow from."""

    hidden_size: int  # the largest, where a model has several


@dataclass(frozen=True)
class Said:
    """What the plan says of a key of the file, and where it has it from."""

    value: Any
    words: str  # training.micro_batch_size is 1 (run.yaml:12)


def chosen(name: str, *, max_tokens: int, use_4bit: bool, fits_on_one_gpu: bool | None) -> str:
    """The file that `training.deepspeed: auto` stands for; another name stands for itself."""
    if name != AUTO:
        return name
    if use_4bit:
        return "zero2"  # a base in 4 bits is small: sharding it costs more than it frees
    return "zero3" if max_tokens > LONG_ROWS or fits_on_one_gpu is False else "zero2"


def read(name: str) -> Content:
    """A shipped file by its name, or the user's own by its path."""
    text = _text(_path(name), name)
    try:
        content = json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        what = f"not valid JSON: {error.msg.lower()} (column {error.colno})"
        raise InputError(f"{name}:{error.lineno}: {what}; JSON has no comments and no trailing commas") from None
    except RecursionError:
        raise InputError(f"{name}: nested too deeply") from None
    except ValueError as error:  # of our two hooks, or a number of more digits than Python converts
        raise InputError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f'{name}: an object is needed, {{"zero_optimization": {{"stage": 2}}}} at least')
    return content


def stage_of(content: Content) -> int:
    """The ZeRO stage of a file; 0 where none is written that DeepSpeed knows."""
    given = _at(content, _STAGE)
    return next((stage for stage in (1, 2, 3) if _same(given, stage)), 0)


def filled(content: Content, phase: PhasePlan, shape: ModelShape, *, name: str, on_gpu: bool) -> Content:
    """The content with everything that the plan and the model know of it; or all that is wrong with it, at once."""
    _refuse(name, _misshapen(content))  # alone: what is no object cannot be looked into
    said = _said(phase)
    result = {key: copy.deepcopy(value) for key, value in content.items() if key not in _REFUSED}
    for path, plan in said.items():
        _put(result, path, plan.value)
    for path, value in (_sizes(shape) | _LOSS_SCALING).items():
        if _at(result, path) == AUTO:
            _put(result, path, value)
    for path, value in _habits(result).items():
        if _at(result, path) in (AUTO, _ABSENT):
            _put(result, path, value)
    wrong = [*_contradictions(content, said, name), *_wrong_stage(content, phase)]
    _refuse(name, [*wrong, *_unsupported(content, phase, on_gpu), *_left(result)])
    return result


# Reading --------------------------------------------------------------------------------------------------------------


def _path(name: str) -> Path:
    shipped = shipped_names("deepspeed_configs")
    if name in shipped:
        return shipped_folder("deepspeed_configs") / f"{name}.json"
    if not name.endswith(".json"):
        known = f"{', '.join(shipped)}, or the path of a .json file{nearest(name, shipped)}"
        raise InputError(f"training.deepspeed: given {name!r}; allowed: {known}")
    return Path(name)


def _text(path: Path, name: str) -> str:
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        shipped = ", ".join(shipped_names("deepspeed_configs"))
        what = f"no such file (looked from {Path.cwd()}); give another path, or the name of a shipped one: {shipped}"
        raise InputError(f"{name}: {what}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> Content:
    """json would keep the last of two, and what a person reads first would not hold."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{_shown(twice[0])} stands twice in one object; keep one of them")
    return dict(pairs)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number there; write a finite one")


# What the plan and the model know -------------------------------------------------------------------------------------


def _said(phase: PhasePlan) -> dict[str, Said]:
    """The keys that the plan decides, whether or not they are in the file."""
    batch, precision, norm = phase.batch, phase.model.precision, phase.settings.training.max_grad_norm
    if batch is None:
        raise ValueError("a DeepSpeed file is filled for a number of ranks, and the plan has none yet")
    micro, number_format = _words(phase, "training", "micro_batch_size"), _words(phase, "model", "precision")
    return {
        "train_batch_size": Said(batch.rows, _words_of_rows(phase)),
        "train_micro_batch_size_per_gpu": Said(batch.micro_batch_size, micro),
        "gradient_accumulation_steps": Said(batch.accumulation, _words_of_accumulation(phase)),
        "gradient_clipping": Said(norm or 0.0, _words(phase, "training", "max_grad_norm")),  # 0 clips nothing
        "bf16.enabled": Said(precision == "bf16", number_format),
        "fp16.enabled": Said(precision == "fp16", number_format),
    }


def _words(phase: PhasePlan, section: str, key: str) -> str:
    """training.micro_batch_size is 1 (run.yaml:12)"""
    value, origin = getattr(phase.sections()[section], key), phase.origins[section, key]
    shown = value if isinstance(value, str) else _shown(value)
    return f"{section}.{key} is {shown} ({origin.place or origin.kind})"


def _words_of_rows(phase: PhasePlan) -> str:
    if phase.settings.training.global_batch_size is not None:
        return _words(phase, "training", "global_batch_size")
    keys = ("micro_batch_size", "gradient_accumulation_steps")
    parts = " and ".join(_words(phase, "training", key) for key in keys)
    return f"{parts}: {phase.global_rows} rows on {_ranks(phase)}"


def _words_of_accumulation(phase: PhasePlan) -> str:
    if phase.settings.training.global_batch_size is None:
        return _words(phase, "training", "gradient_accumulation_steps")
    rows, micro = _words(phase, "training", "global_batch_size"), _words(phase, "training", "micro_batch_size")
    return f"{rows} and {micro}: {phase.batch.accumulation if phase.batch else 0} steps on {_ranks(phase)}"


def _ranks(phase: PhasePlan) -> str:
    ranks = phase.batch.ranks if phase.batch else 0
    return f"{ranks} rank" + ("s" if ranks > 1 else "")


def _sizes(shape: ModelShape) -> Content:
    """What transformers takes for a model of this width; a bucket holds about one of its matrices."""
    square = shape.hidden_size**2
    sizes = {
        "reduce_bucket_size": square,
        "allgather_bucket_size": square + square % 2,  # DeepSpeed stops at an odd one
        "stage3_prefetch_bucket_size": int(0.9 * shape.hidden_size * shape.hidden_size),
        "stage3_param_persistence_threshold": 10 * shape.hidden_size,
        "stage3_gather_16bit_weights_on_model_save": False,  # no size, but accelerate's answer to its "auto"
    }
    return {f"zero_optimization.{key}": value for key, value in sizes.items()}


def _habits(content: Content) -> Content:
    """What is written where the file is silent."""
    scaling = _LOSS_SCALING if _at(content, "fp16.enabled") is True else {}
    return _HABITS | scaling | ({_FORCED: False} if _offloads_optimizer(content) else {})


def _offloads_optimizer(content: Content) -> bool:
    device = _at(content, "zero_optimization.offload_optimizer.device")
    return device == "cpu" or _at(content, "zero_optimization.cpu_offload") is True


# What is wrong --------------------------------------------------------------------------------------------------------


def _refuse(name: str, wrong: Iterable[str]) -> None:
    if told := [f"{name}: {what}" for what in wrong]:
        raise InputError("\n".join(told))


def _misshapen(content: Content) -> Iterator[str]:
    blocks = ["zero_optimization", "bf16", "fp16"]
    blocks += [f"zero_optimization.{key}" for key in ("offload_optimizer", "offload_param")]
    for path in blocks:
        given = _at(content, path)
        if not isinstance(given, dict) and given is not _ABSENT and not (given is None and "offload" in path):
            yield f"{path} is {_shown(given)}; an object is needed, as in deepspeed_configs/zero2_offload.json"


def _contradictions(content: Content, said: dict[str, Said], name: str) -> Iterator[str]:
    for path, plan in said.items():
        given = _at(content, path)
        if given is _ABSENT or given == AUTO or _same(given, plan.value):
            continue
        if not (path == "gradient_clipping" and given is None and plan.value == 0):
            yield f'{path} is {_shown(given)}, and {plan.words}; make them agree, or write "auto" in {name}'


def _wrong_stage(content: Content, phase: PhasePlan) -> Iterator[str]:
    stage, given = stage_of(content), _at(content, _STAGE)
    if _same(given, 0) and phase.model.precision != "fp32":
        said = _words(phase, "model", "precision")
        yield f"{_STAGE} is 0, and {said}: without ZeRO there are no fp32 weights beside them to learn with; write 2"
    elif stage not in (2, 3) and not _same(given, 0):
        what = "is absent" if given is _ABSENT else f"is {_shown(given)}"
        yield f"{_STAGE} {what}; write 2, or 3 to shard the weights, too"
    if stage == 3 and phase.model.use_4bit and _storage(phase) != phase.model.precision:
        both = f"{_words(phase, 'model', 'bnb_4bit_quant_storage')} and {_words(phase, 'model', 'precision')}"
        yield f"{_STAGE} is 3, and {both}: it shards 4-bit weights only where they are the same; write 2, or use auto"


def _unsupported(content: Content, phase: PhasePlan, on_gpu: bool) -> Iterator[str]:
    yield from (f"{key}: {why}" for key, why in _REFUSED.items() if key in content)
    for part in ("offload_optimizer", "offload_param"):
        if _at(content, f"zero_optimization.{part}.device") == "nvme":
            yield f"zero_optimization.{part}.device is nvme, of which no checkpoint can be made; write cpu"
    forced = _at(content, _FORCED)
    if _offloads_optimizer(content) and forced not in (_ABSENT, AUTO, False):
        optimizer = _words(phase, "training", "optimizer")
        yield f"{_FORCED} is {_shown(forced)}, and {optimizer}: DeepSpeedCPUAdam would take its place; write false"
    if phase.model.precision == "fp16" and not on_gpu:
        yield f"{_words(phase, 'model', 'precision')}, which DeepSpeed refuses without a GPU; use bf16 or fp32"


def _storage(phase: PhasePlan) -> str:
    storage = phase.model.bnb_4bit_quant_storage
    return phase.model.precision if storage == AUTO else storage


def _left(result: Content) -> Iterator[str]:
    for path in _autos(result, ""):
        if path != _STAGE:
            yield f'{path} is "auto", and nothing in the plan fills it; write a value, or take it out'


def _autos(content: Any, path: str) -> Iterator[str]:
    """The path of every "auto" in it."""
    if content == AUTO:
        yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from _autos(value, f"{path}.{key}" if path else str(key))


# Values at a path -----------------------------------------------------------------------------------------------------


def _at(content: Content, path: str) -> Any:
    found: Any = content
    for key in path.split("."):
        found = found.get(key, _ABSENT) if isinstance(found, dict) else _ABSENT
    return found


def _put(content: Content, path: str, value: Any) -> None:
    *above, key = path.split(".")
    for block in above:
        content = content.setdefault(block, {})
    content[key] = value


def _same(given: Any, wanted: Any) -> bool:
    """1.0 is 1, and true is neither."""
    return isinstance(given, bool) == isinstance(wanted, bool) and bool(given == wanted)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
