"""The held-out documents of every phase, as training measured them: the same rows, the same mean over tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phased_cpt.data.prepare import prepare
from phased_cpt.data.prepared import PreparedPhase, PreparedRun
from phased_cpt.data.watch import Watcher
from phased_cpt.errors import InputError
from phased_cpt.evals import held_out_losses
from phased_cpt.evals.loss import chosen_loss, row_losses
from phased_cpt.evals.rows import Rows
from phased_cpt.evaluate.course import Course
from phased_cpt.ledger import RunRecord
from phased_cpt.model.base import head_of
from phased_cpt.plan import Plan


@dataclass(frozen=True)
class HeldOutSet:
    """What a phase holds out; or a set of evaluation.general, which is never trained."""

    rows: Rows
    batch_rows: int
    is_general: bool = False


def held_out_sets(record: RunRecord, plan: Plan, watcher: Watcher) -> dict[str, HeldOutSet]:
    """Of every phase of a run, and its general sets, by their names; an InputError says why there is none."""
    prepared = prepare(plan, watcher)
    _require_same_data(record, prepared)
    sets = {
        phase.plan.name: HeldOutSet(Rows(phase.eval.index.blocks), phase.plan.settings.evaluation.micro_batch_size)
        for phase in prepared.phases
        if phase.eval
    }
    general = plan.config.evaluation.micro_batch_size
    sets |= {name: HeldOutSet(Rows(each.index.blocks), general, True) for name, each in prepared.general.items()}
    if not sets:
        raise InputError(
            f"{plan.name}: this run holds nothing out (data.eval_share is 0, and no phase has eval_sources)"
        )
    return sets


def _require_same_data(record: RunRecord, prepared: PreparedRun) -> None:
    """What was trained on and what was held out is what it was when the phases were trained."""
    begun = {phase.name: phase.fingerprint.parts for phase in record.phases if phase.fingerprint}
    for phase in prepared.phases:
        parts = begun.get(phase.plan.name, {})
        if parts.get("tokenizer", prepared.tokenizer.digest) != prepared.tokenizer.digest:
            name = prepared.tokenizer.name
            raise InputError(f"model.tokenizer: {name} is not what {phase.plan.name} was trained with; put it back")
        for key, digest in phase.source_digests.items():
            if parts.get(key, digest) != digest:
                what = f"its documents are not those that {phase.plan.name} was trained with"
                raise InputError(f"phases.{phase.plan.name}.{key}: {_path(phase, key)}: {what}; put them back")


def _path(phase: PreparedPhase, key: str) -> str:
    """Which source a key such as eval_sources.0 means."""
    field, _, at = key.partition(".")
    if field == "replay":
        return f"what it replays of {at.partition('.')[0]}"
    return str(getattr(phase.plan.phase, field)[int(at)].path)


def measured(
    model: PreTrainedModel, sets: Mapping[str, HeldOutSet], device: torch.device, course: Course
) -> dict[str, dict[str, Any]]:
    """What a model loses on every set."""
    facts, head = {}, head_of(model)
    kind, _why = chosen_loss("auto", model, head, device)
    joined = str(model.config._attn_implementation).startswith("flash")
    for name, each in sets.items():

        def losses(batch: dict[str, Tensor], name: str = name) -> Tensor:
            found = row_losses(model, head, batch, kind, joined)
            course.advance(f"held-out rows of {name}", len(found))
            return found

        rows = {name: each.rows}
        found = held_out_losses(model, losses, rows, batch_rows=each.batch_rows, rank=0, ranks=1, device=device)[name]
        facts[name] = {"eval_loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
    return facts
