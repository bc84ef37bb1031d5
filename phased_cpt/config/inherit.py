"""What holds in a phase: its own values, and the run's where it says nothing."""

from dataclasses import dataclass, replace
from typing import TypeVar

from phased_cpt.config.schema import Data, Evaluation, Lora, RunConfig, Section, Training

# The sections that a phase may override, and so the ones that are resolved for each phase.
OVERRIDABLE = ("lora", "data", "training", "evaluation")

AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Settings:
    """The sections of one phase, resolved."""

    lora: Lora
    data: Data
    training: Training
    evaluation: Evaluation
    from_base: bool  # no adapter is handed to the phase: it begins a fresh one, or trains every weight
    stacked: bool  # it begins a fresh one on top of those that are handed to it, which are frozen
    born: int  # index of the phase that began the adapter
    warms_up: bool = True  # but for `infinite`, which goes on at its rate with the weights
    anneals: bool = True  # in the end; not before a phase that goes on at its rate


def settings_of_phases(config: RunConfig) -> list[Settings]:
    """The settings of every phase, in order; an adapter that goes on brings its own along.

    run lora {r: 8}    phase a lora {r: 16}    →    b    →    c, after `handover: merge` or `stack`
                                       16           16        8
    """
    found: list[Settings] = []
    for index, phase in enumerate(config.phases):
        before = found[-1] if found else None
        handover = config.phases[index - 1].handover if index else "continue"
        goes_on = before if before and before.lora.enabled and handover == "continue" else None
        stacked = before is not None and before.lora.enabled and handover == "stack"
        found.append(
            Settings(
                lora=_over(goes_on.lora if goes_on else config.lora, phase.lora),
                data=with_overlap(_over(config.data, phase.data), config.data, phase.data),
                training=_over(config.training, phase.training),
                evaluation=_over(config.evaluation, phase.evaluation),
                from_base=goes_on is None and not stacked and (index > 0 or config.model.adapter is None),
                stacked=stacked,
                born=goes_on.born if goes_on else index,
            )
        )
    return _in_rows(found)


def _in_rows(settings: list[Settings]) -> list[Settings]:
    """Phases that share one `infinite` rate; where fresh weights begin, that rate would be a shock to them.

    infinite  infinite | a fresh adapter, infinite        /\\____ _____\\ | /\\_____\\
    """
    goes_on = [False, *map(_goes_on_at_its_rate, settings, settings[1:]), False]
    return [
        replace(each, warms_up=not goes_on[index], anneals=not goes_on[index + 1])
        for index, each in enumerate(settings)
    ]


def _goes_on_at_its_rate(before: Settings, after: Settings) -> bool:
    fresh = before.lora.enabled != after.lora.enabled or (after.from_base and after.lora.enabled)
    shapes = {before.training.lr_scheduler, after.training.lr_scheduler}
    return shapes == {"infinite"} and not fresh and not after.stacked


def with_overlap(data: Data, *given: Data | None) -> Data:
    """An overlap that nobody gave shrinks with the window: 2048 of 32768, 32 of 512."""
    if any(section and "overlap_tokens" in section.model_fields_set for section in given):
        return data
    return data.model_copy(update={"overlap_tokens": min(data.overlap_tokens, data.max_tokens // 16)})


def _over(base: AnySection, own: AnySection | None) -> AnySection:
    """The base section with the values that a phase gave itself."""
    return base if own is None else base.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})
