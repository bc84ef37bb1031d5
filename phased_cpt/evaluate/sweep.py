"""How much of what a run has added is worth keeping: base + λ · all of it, measured for a few λ.

λ        foundation   evolution   mean     wiki, against the base
0        4.21         4.30        4.25     0        the base
0.7      3.05         2.91        2.98     +0.01    ← the lowest mean
1        3.10         2.95        3.03     +0.04    as published
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from phased_cpt.blend import Published
from phased_cpt.chain import Chain
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.evaluate.course import Course
from phased_cpt.evaluate.held_out import HeldOutSet, held_out_sets, measured
from phased_cpt.ledger import PhaseRecord
from phased_cpt.merge.adapters import base_name
from phased_cpt.merge.numbers import Between
from phased_cpt.merge.story import weights_of
from phased_cpt.model.lineup import BASE, MERGED, Lineup, Member, base_of_run, line_up, read_run
from phased_cpt.plan import Plan
from phased_cpt.tables.evaluation import valid
from phased_cpt.wanted import SweepWanted

PART = "λ"  # as no phase is called
RULE = "the lowest mean over all held-out tokens of the phases up to this one and of general sets; or the largest λ"

Facts = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What is scaled, and on what it is measured."""

    plan: Plan
    phase: PhaseRecord
    chain: Chain
    lineup: Lineup
    sets: Mapping[str, HeldOutSet]
    course: Course

    def losses(self, strength: float) -> dict[str, Facts]:
        """What the base loses, moved by so much of the change; at 1, what was published itself loses."""
        self.course.at(f"λ = {strength:g}")
        if strength == 1.0:
            name = self.phase.folder if self.phase.name in (BASE, MERGED) else self.phase.name
            self.lineup.drop_all_but([name])
            with self.lineup.as_(name) as model:
                return self._measured(model)
        with self.lineup.as_(PART if self.chain.adapters else BASE, strength) as model, self._moved(model, strength):
            return self._measured(model)

    def _measured(self, model: PreTrainedModel) -> dict[str, Facts]:
        return measured(model, self.sets, self.lineup.device, self.course)

    @contextmanager
    def _moved(self, model: PreTrainedModel, strength: float) -> Iterator[None]:
        """Where every weight was trained, every weight lies between the two, tensor by tensor, as files have them."""
        if self.chain.folder:
            trusted = self.plan.config.model.trust_remote_code
            root, here = self.lineup.root, self.lineup.members[BASE].whole.folder
            assert root is not None
            base, other = (weights_of(each, trust_remote_code=trusted) for each in (here, root / self.chain.folder))
            between = Between(base.folder, base.places, {}, other, strength)
            for name, param in model.named_parameters():
                if base_name(name) in base.places.of:
                    param.data.copy_(between.read(base_name(name)))
        yield


def swept(wanted: SweepWanted) -> Facts:
    """The facts: every λ with what it loses, and which is chosen."""
    course = Course()
    assert wanted.models.run_dir is not None
    root = wanted.models.run_dir.expanduser().resolve()
    record, plan = read_run(root, wanted.models.base)
    run = Published(plan, root, base_of_run(plan, root, record), record.phases)
    phase = run.phase(wanted.phase, "--phase")
    chain = run.chain(phase, course.tell)
    sets = held_out_sets(record, plan, course.watcher)
    taught = [each.name for each in record.phases[: record.phases.index(phase) + 1] if each.name in sets]
    if not taught:
        raise InputError(f"{root}: no phase up to {phase.name} holds anything out, so no λ can be chosen")
    lineup = _of_a_chain(line_up(wanted.models, tell=course.tell), root, chain, wanted)
    if chain.through_merges and (plan.config.model.precision != "fp32" or lineup.members[BASE].whole.storage):
        course.tell("earlier phases were merged and rounded on the way: λ = 1 has that in it, what is below it has not")
    strengths = sorted({0.0, *wanted.strengths, 1.0}, key=lambda each: (each == 1.0, each))
    course.begin(len(strengths) * sum(len(each.rows) for each in sets.values()))
    sweep = Sweep(plan, phase, chain, lineup, sets, course)
    try:
        found = {strength: sweep.losses(strength) for strength in strengths}
    except torch.OutOfMemoryError:
        raise PhasedCptError(f"{lineup.device} has no room for it; try --device cpu") from None
    finally:
        course.pause()
    return valid({"run": str(root), "phase": phase.name} | facts_of(found, taught, sets))


def _of_a_chain(lineup: Lineup, root: Path, chain: Chain, wanted: SweepWanted) -> Lineup:
    """The models of the run, and one of the first base with every adapter of the chain on it at once."""
    base = lineup.members[BASE]
    if chain.folder and base.whole.storage is not None:
        what = f"below the adapters lies {chain.folder}, whose weights are moved one by one"
        raise InputError(f"{what}, which 4-bit weights cannot be; add --16bit")
    part = Member(base.whole, tuple(root / each.folder for each in chain.adapters))
    members = {BASE: base, PART: part} | {name: each for name, each in lineup.members.items() if name != MERGED}
    return lineup.with_members(members)


def facts_of(found: Mapping[float, dict[str, Facts]], taught: Sequence[str], sets: Mapping[str, HeldOutSet]) -> Facts:
    """The choice, and what it was made by."""
    tokens = {name: facts["tokens"] for name, facts in found[0.0].items()}
    general = [name for name, each in sets.items() if each.is_general]
    judged = [*taught, *general]  # what the base knew counts as what it was taught
    lines = []
    for strength in sorted(found):
        losses = {name: facts["eval_loss"] for name, facts in found[strength].items()}
        mean = sum(losses[name] * tokens[name] for name in judged) / sum(tokens[name] for name in judged)
        drift = {name: losses[name] - found[0.0][name]["eval_loss"] for name in general}
        lines.append({"lambda": strength, "losses": losses, "mean": mean, "drift": drift})
    finite = [line for line in lines if math.isfinite(line["mean"])] or lines[-1:]
    chosen = min(finite, key=lambda line: (line["mean"], -line["lambda"]))
    kinds = {name: "general" if name in general else "phase" for name in sets}
    return {
        "rule": RULE,
        "sets": [{"name": name, "kind": kind, "tokens": tokens[name]} for name, kind in kinds.items()],
        "mean_of": judged,
        "strengths": lines,
        "chosen": chosen["lambda"],
    }
