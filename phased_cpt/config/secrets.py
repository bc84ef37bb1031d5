"""Keys and tokens stay in the environment: one that is found in a file is refused, and never repeated."""

import os
import re
from collections.abc import Iterator
from typing import Any

from phased_cpt.config.read import Keys, dotted
from phased_cpt.errors import Problem

_SECRET_KEY = re.compile(r"(^|_)(api_?key|token|access_?key|secret|password|passwd|credentials?)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bwandb_v\d+_[A-Za-z0-9_]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s@]+@"
)
_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def secrets_in(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Problem]]:
    """Every secret in a tree of values, with its place and what to do instead."""
    if isinstance(value, dict):
        for key, child in value.items():
            if _SECRET_VALUE.search(str(key)):
                yield (*keys, key), _refusal(keys, key)
            # A null or a switch is no secret; `tokens: 2e9` and `tokenizer:` do not match the pattern.
            elif _SECRET_KEY.search(key) and not isinstance(child, bool | None):
                yield (*keys, key), _refusal((*keys, key), key)
            else:
                yield from secrets_in(child, (*keys, key))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from secrets_in(child, (*keys, i))
    elif isinstance(value, str) and (_SECRET_VALUE.search(value) or _is_in_environment(value)):
        yield keys, _refusal(keys, value)


def _is_in_environment(value: str) -> bool:
    return len(value) >= 8 and any(value == os.environ.get(name) for name in _VARIABLES)


def _refusal(keys: Keys, hint: str) -> Problem:
    path = dotted(keys)
    about = f"{path} {hint}".lower()
    variable = "HF_TOKEN" if re.search(r"\bhf_|hugging|hub", about) else "WANDB_API_KEY" if "wandb" in about else ""
    instead = (
        f"`export {variable}=…`"
        if variable
        else "an environment variable (`export WANDB_API_KEY=…`, `export HF_TOKEN=…`)"
    )
    return Problem(path, f"given a secret (not shown); take it out of the file and set {instead} before the run")
