"""What is asked of the verbs that come after a run: plain values, which cost no import."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelsWanted:
    """Which models are meant: those of a run, or a base and an adapter from anywhere, or a folder of weights."""

    run_dir: Path | None = None
    base: str | None = None  # a folder or a hub id; with a run: where its base is now
    adapter: Path | None = None
    model: Path | None = None  # a plain Transformers folder, such as merged_model/
    use_4bit: bool | None = None  # None: as the run was trained
    device: str | None = None


@dataclass(frozen=True)
class ChatWanted:
    """A conversation, or a file of prompts."""

    models: ModelsWanted
    prompts: Path | None = None
    as_json: bool = False
    seed: int | None = None
    compare: tuple[str, ...] = ()
    temperature: float | None = None  # None: 0 for a file of prompts, which is answered the same each time
    max_tokens: int | None = None
    plain: bool = False  # prompts are continued as they stand, though there is a chat template


@dataclass(frozen=True)
class EvaluateWanted:
    """What is measured, and on which of the models."""

    models: ModelsWanted
    only: tuple[str, ...] = ()  # names of models: base, phases, merged; all of them if empty
    questions: Path | None = None
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness
    include_path: Path | None = None  # where those of one's own lie
    limit: int | None = None
    as_json: bool = False


@dataclass(frozen=True)
class SweepWanted:
    """How much of a run is worth keeping: which of it, and how much of that."""

    models: ModelsWanted
    phase: str | None = None  # up to this one; the last that has published if absent
    strengths: tuple[float, ...] = ()  # besides 0 and 1, which are always measured
