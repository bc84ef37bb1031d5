"""What holds in a phase: its own values, and the run's where it says nothing."""

from dataclasses import dataclass
from typing import TypeVar

from phased_cpt.config.schema import Data, Evaluation, Lora, Phase, RunConfig, Section, Training

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


def settings_of(config: RunConfig, phase: Phase) -> Settings:
    return Settings(
        lora=_over(config.lora, phase.lora),
        data=_over(config.data, phase.data),
        training=_over(config.training, phase.training),
        evaluation=_over(config.evaluation, phase.evaluation),
    )


def starts_fresh(config: RunConfig, index: int) -> bool:
    """Whether the phase begins a new adapter instead of going on with one.

    The first does (unless an adapter is given), and so does one that starts from a base: after `handover: merge`, or
    after a phase that trained every weight.
    """
    if index == 0:
        return config.model.adapter is None
    before = config.phases[index - 1]
    return before.handover == "merge" or not settings_of(config, before).lora.enabled


def _over(base: AnySection, own: AnySection | None) -> AnySection:
    """The base section with the values that a phase gave itself."""
    return base if own is None else base.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})
