"""Keys and tokens stay in the environment: one that is found in a file is refused, and never repeated."""

import os
import re
from collections.abc import Iterator
from typing import Any

from phased_cpt.config.read import Keys, dotted

# bos_token, pad_token and their like are part of a model's config; an access token says whose it is, or nothing.
_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|access_?key|secret_?key|private_?key|wandb_key|secret|password|passwd|credentials?)$"
    r"|^token$|(^|_)(api|access|auth|bearer|hf|hub|huggingface|wandb|github|gitlab)_?token$"
)
_SECRET_VALUE = re.compile(
    r"(hf_|api_org_)[A-Za-z0-9]{20,}|wandb_v\d+_[A-Za-z0-9_]{20,}"
    r"|\bsk-[A-Za-z0-9]{20,}|\bsk-(proj|ant|or)-[\w-]{20,}"  # but sk-SK-slovak-corpus.jsonl is a language
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
    # A password in any URL, and whatever stands before the host of a web page; but git@, and alice@ of other systems.
    r"|(?<=://)[^/\s@:]*:[^/\s@]+(?=@)|(?<=https://)[^/\s@]+(?=@)"
)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")  # looks like a commit, too, so it counts only under a key that says wandb
_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def secrets_in(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """The place of every secret in a tree of values, and what to do instead."""
    if isinstance(value, dict):
        for key, child in value.items():
            here = (*keys, key)
            if scrubbed(str(key)) != str(key) or (_is_secret_key(key) and not isinstance(child, bool | None)):
                yield here, _instead(here, child)
            else:
                yield from secrets_in(child, here)
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from secrets_in(child, (*keys, i))
    elif scrubbed(str(value)) != str(value) or ("wandb" in dotted(keys) and _WANDB_KEY.fullmatch(str(value))):
        yield keys, _instead(keys, value)


def scrubbed(text: str) -> str:
    """A text without anything that looks like a secret, or is one that the environment holds."""
    text = _SECRET_VALUE.sub("<secret>", text)
    for value in filter(None, map(os.environ.get, _VARIABLES)):
        text = text.replace(value, "<secret>") if len(value) >= 8 else text
    return text


def _is_secret_key(key: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").lower()  # hfToken, api-key
    return bool(_SECRET_KEY.search(snake))


def _instead(keys: Keys, value: Any) -> str:
    about = f"{dotted(keys)} {value}".lower()
    variable = "HF_TOKEN" if re.search(r"\bhf|hugging|\bhub", about) else "WANDB_API_KEY" if "wandb" in about else ""
    use = f"`export {variable}=…`" if variable else "an environment variable (WANDB_API_KEY, HF_TOKEN)"
    return f"given a secret (not shown); take it out of the file and use {use} instead"
