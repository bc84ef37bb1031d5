"""What a user writes: the YAML's schema, how it is read, and the rules across its fields."""

from phased_cpt.config.load import Loaded, from_objects, from_record, load
from phased_cpt.config.schema import (
    Checkpoint,
    Data,
    Evaluation,
    Launch,
    Lora,
    Merge,
    Model,
    Phase,
    Run,
    RunConfig,
    Source,
    Tracking,
    Training,
)

__all__ = [
    "Checkpoint",
    "Data",
    "Evaluation",
    "Launch",
    "Loaded",
    "Lora",
    "Merge",
    "Model",
    "Phase",
    "Run",
    "RunConfig",
    "Source",
    "Tracking",
    "Training",
    "from_objects",
    "from_record",
    "load",
]
