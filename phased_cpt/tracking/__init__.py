"""Where the figures of a run go: every step and every evaluation is given to each sink of one list."""

from collections.abc import Callable

from phased_cpt.tracking.console import open_console
from phased_cpt.tracking.jsonl import Jsonl
from phased_cpt.tracking.sink import Line, Sink, Sinks, Stretch, WandbSettings
from phased_cpt.tracking.tensorboard import open_tensorboard
from phased_cpt.tracking.training_log import TrainingLog
from phased_cpt.tracking.wandb import open_wandb

__all__ = ["SINKS", "Line", "Sink", "Sinks", "Stretch", "WandbSettings", "open_sinks"]

# In this order they are opened and written to; None: this one is switched off. They are closed from the end, so that
# what fails in closing is still told on the console.
SINKS: dict[str, Callable[[Stretch], Sink | None]] = {
    "jsonl": Jsonl,
    "console": open_console,
    "training_log": TrainingLog,
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
}


def open_sinks(stretch: Stretch) -> Sinks:
    """Every sink that is switched on; one that cannot be opened is told, and training goes on without it."""
    opened: dict[str, Sink] = {}
    failed: dict[str, Exception] = {}
    for name, open_sink in SINKS.items():
        try:
            sink = open_sink(stretch)
        except Exception as reason:
            failed[name] = reason
            continue
        if sink is not None:
            opened[name] = sink
    sinks = Sinks(opened)
    for name, why in failed.items():  # only now: those that tell it may stand behind it in the list
        sinks.warn(name, why)
    return sinks
