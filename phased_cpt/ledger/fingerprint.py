"""What a phase is made of, as one chained digest: whatever it starts from, reads and was told is in it.

    phase 1: parent ─┐             phase 2: parent = what phase 1 published ─┐
             data ───┼─ digest                                      data ───┼─ digest   …
             recipe ─┘                                              recipe ─┘

The values stand beside the digest, so that a difference can be shown and not only noticed.
"""

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from phased_cpt.errors import PhasedCptError
from phased_cpt.plan import PhasePlan

Differences = dict[str, tuple[JsonValue, JsonValue]]


class Record(BaseModel):
    """A part of run.json."""

    # What a later version has added is kept when this one writes the file; FORMAT rises where that would be wrong.
    model_config = ConfigDict(frozen=True, extra="allow")


class Adapter(Record):
    """An adapter on a base."""

    digest: str
    folder: str = ""  # relative to the run folder; empty for an adapter that came from outside
    scale: float = 1.0


class Weights(Record):
    """What a phase starts from, and what it publishes: a base, and the adapters on it in order."""

    kind: Literal["adapter", "base"]
    base: str  # digest of the base weights
    adapters: tuple[Adapter, ...] = ()
    folder: str = ""  # of a base that a phase has published, relative to the run folder

    @model_validator(mode="after")
    def _has_what_it_says(self) -> Self:
        if self.kind == "adapter" and not self.adapters:
            raise ValueError("an adapter is to be published, and there is none")
        for folder in (self.folder, *(adapter.folder for adapter in self.adapters)):
            if folder.startswith("/") or ".." in folder.split("/"):
                raise ValueError(f"{folder!r} does not lie in the run folder")
        return self

    @property
    def digest(self) -> str:
        return digest_of([self.kind, self.base, [[adapter.digest, adapter.scale] for adapter in self.adapters]])


class Inputs(Record):
    """What is known of a phase only when it is about to begin."""

    start: Weights
    tokenizer: str  # digest
    sources: dict[str, str]  # digest of the bytes, by the order of the sources: "sources.0", "eval_sources.0"
    # Versions, kernels, the DeepSpeed file as it is filled: what only the one who launches knows.
    execution: dict[str, JsonValue] = Field(default_factory=dict)


class Fingerprint(Record):
    """The digest of a phase, and all that went into it."""

    digest: str
    parts: dict[str, JsonValue]


def fingerprint_of(phase: PhasePlan, inputs: Inputs) -> Fingerprint:
    if phase.global_rows is None:
        raise PhasedCptError("the number of GPUs is not known, and so neither is the batch; set launch.num_gpus")
    parts = {
        "start": inputs.start.digest,
        "base": inputs.start.base,
        "tokenizer": inputs.tokenizer,
        **inputs.sources,
        **phase.values("recipe"),
    }
    return Fingerprint(digest=digest_of(parts), parts=parts)


def digest_of(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, each with its old and its new value; None where there was none."""
    pairs = {key: (was.get(key), now.get(key)) for key in sorted({*was, *now})}
    return {key: pair for key, pair in pairs.items() if digest_of(pair[0]) != digest_of(pair[1])}  # 1 is not true


def told(difference: dict[str, tuple[Any, Any]]) -> str:
    """The differences, a line each."""
    return "\n".join(f"    {key}: was {_short(was)}, is {_short(now)}" for key, (was, now) in difference.items())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}…" if is_digest else text if len(text) <= 80 else text[:77] + "…"
