"""A checkpoint of a phase under way: it goes on on any number of ranks under any ZeRO stage, and holds no pickle.

checkpoint-40/   adapter_model.safetensors (or model.safetensors), its configs: the fp32 masters, as they are published
                 optimizer.safetensors: exp_avg.<weight>, exp_avg_sq.<weight>, … (or optimizer-<rank>: see moments)
                 state.json: how far the phase has come, and the counts of engine, optimizer and loss scaler
                 manifest.json: size and sha256 of each, last
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.model.tensor_file import TensorFile
from phased_cpt.sealed import Manifest, building, seal
from phased_cpt.train import moments
from phased_cpt.train.engine import Rank, meet
from phased_cpt.train.masters import masters_of, shape_of, trained
from phased_cpt.train.publish import write_weights
from phased_cpt.train.standing import Standing

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
COUNTS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # of DeepSpeed's engine
BYTES_PER_WEIGHT = 12  # master, exp_avg and exp_avg_sq of AdamW, in fp32


@dataclass(frozen=True)
class Counts:
    """Numbers that engine and optimizer keep."""

    engine: dict[str, int]
    optimizer: dict[str, float]
    loss_scaler: dict[str, float]  # of fp16
    by_weight: tuple[str, ...]
    whole: bool


# Saved -------------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    engine: Any,
    rank: Rank,
    folder: Path,
    standing: Standing,
    manifest: Manifest,
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Collective; a few tensors at a time, so that no more than those are held besides what is there."""
    kinds = moments.kinds(engine)
    if rank.first:
        building(folder)
    meet(rank)
    beside = folder.with_name(f".{folder.name}.building")
    digests = write_weights(model, beside, writes=rank.first, beat=beat)
    if kinds.whole:
        digests |= _write_moments(model, engine, kinds.by_weight, beside / OPTIMIZER, rank.first, beat)
    else:
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in moments.of_this_rank(engine)}
        save_file(own, beside / of_rank(rank.number))
        meet(rank)
    if rank.first:
        counts = Counts(
            engine={name: int(getattr(engine, name)) for name in COUNTS},
            optimizer=kinds.numbers,
            loss_scaler=_numbers(getattr(engine.optimizer, "loss_scaler", None)),
            by_weight=kinds.by_weight,
            whole=kinds.whole,
        )
        (beside / STATE).write_text(json.dumps({"counts": asdict(counts), "standing": standing.text()}))
        seal(folder, manifest, digests)
    meet(rank)


def save_weights(
    model: nn.Module, rank: Rank, folder: Path, manifest: Manifest, beat: Callable[[], None] = lambda: None
) -> None:
    """The weights alone. Collective."""
    beside = building(folder) if rank.first else folder  # the others write nothing
    digests = write_weights(model, beside, writes=rank.first, beat=beat)
    if rank.first:
        seal(folder, manifest, digests)


def _write_moments(
    model: nn.Module, engine: Any, keys: tuple[str, ...], path: Path, writes: bool, beat: Callable[[], None]
) -> dict[str, str]:
    shapes = {f"{key}.{name}": (torch.float32, shape_of(weight)) for key in keys for name, weight in trained(model)}
    file = TensorFile(path, shapes, beat) if writes else None
    for key in keys:
        for name, _, moment in moments.moments_of(engine, model, key):
            if file:
                file.add(f"{key}.{name}", moment)
    return {path.name: file.close()} if file else {}


def of_rank(number: int) -> str:
    return f"optimizer-{number}.safetensors"


def _numbers(scaler: Any) -> dict[str, float]:
    """A scaler that never changes has nothing to save."""
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: value for name, value in vars(scaler).items() if isinstance(value, int | float)}


# Gone on from ------------------------------------------------------------------------------------------------------


def standing_of(folder: Path | None) -> Standing:
    """How far a phase has come; a fresh one has come nowhere."""
    return Standing() if folder is None else Standing.parse(_state(folder)["standing"])


def _state(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    return content


def restore(model: nn.Module, engine: Any, scheduler: LambdaLR, rank: Rank, folder: Path) -> None:
    """What optimizer, schedule and engine knew; the masters are put back by whoever puts back any start. Collective."""
    counts = restore_optimizer(model, engine, rank, folder)
    for name, count in counts.engine.items():
        setattr(engine, name, count)
    for name, value in counts.loss_scaler.items():
        setattr(engine.optimizer.loss_scaler, name, value)
    _set_schedule(scheduler, standing_of(folder))


def restore_optimizer(model: nn.Module, engine: Any, rank: Rank, folder: Path) -> Counts:
    """What the optimizer knew, and nothing else: of this phase, or of the one before. Collective."""
    values = _state(folder)["counts"]
    counts = Counts(**values | {"by_weight": tuple(values["by_weight"])})
    moments.wake(engine)
    if counts.whole:
        _restore_by_weight(model, engine, counts.by_weight, folder / OPTIMIZER)
    else:
        _restore_by_rank(engine, rank, folder)
    moments.set_numbers(engine, counts.optimizer)
    return counts


def _restore_by_weight(model: nn.Module, engine: Any, keys: tuple[str, ...], path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name, weight in trained(model):
            for key in keys:
                moment = file.get_tensor(f"{key}.{name}")
                moments.set_moment(engine, weight, key, moment.to(weight.device))


def _restore_by_rank(engine: Any, rank: Rank, folder: Path) -> None:
    """States that are quantised over a rank's part: into the same parts, or not at all."""
    saved = load_file(folder / of_rank(rank.number)) if (folder / of_rank(rank.number)).exists() else {}
    here = dict(moments.of_this_rank(engine))
    ranks = len(list(folder.glob("optimizer-*.safetensors")))
    if ranks != rank.of or {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in here.items()}:
        what = f"the state of this optimizer is kept in the parts of {ranks} ranks and their ZeRO stage"
        raise InputError(f"{folder}: {what}; go on with the same, or begin the phase anew with `--resume none`")
    for name, tensor in here.items():
        tensor.copy_(saved[name])


def _set_schedule(scheduler: LambdaLR, standing: Standing) -> None:
    done = standing.step - standing.skipped_steps
    scheduler.last_epoch, scheduler._step_count = done, done + 1
    rates = [rate * factor(done) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def require_restored(model: nn.Module, engine: Any, folder: Path) -> int:
    """Every moment is what the file says, to the bit, wherever DeepSpeed keeps it; returns how many were looked at."""
    looked_at = 0
    for name, held, saved in _moments(model, engine, folder):
        if not torch.equal(held.cpu(), saved):
            raise PhasedCptError(f"{folder}: {name} did not come back as it was saved; nothing is trained on it")
        looked_at += 1
    return looked_at


def _moments(model: nn.Module, engine: Any, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    if not (folder / OPTIMIZER).exists():
        return
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        for key in moments.kinds(engine).by_weight:
            for name, _, held in moments.moments_of(engine, model, key):
                yield f"{key}.{name}", held, file.get_tensor(f"{key}.{name}")


def require_one_weight(model: nn.Module) -> None:
    """The weights that the model computes with are its masters, rounded. One that is stale trains on for a step.

    Reading the masters back does not show it: an engine makes the copy when it is built, or when it steps.
    """
    for name, weight, master in masters_of(model):
        with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            if not torch.equal(weight.detach().cpu(), master.to(weight.dtype).cpu()):
                raise PhasedCptError(f"{name} is not what its fp32 master says; nothing is trained on it")
