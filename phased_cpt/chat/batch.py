"""A file of prompts, answered by each of the models, and the end."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phased_cpt.chat.answer import Answer, answer
from phased_cpt.chat.prompt import Mode, prompt_for
from phased_cpt.chat.screen import Screen
from phased_cpt.chat.settings import Settings
from phased_cpt.errors import InputError
from phased_cpt.model.lineup import Lineup


@dataclass(frozen=True)
class Answered:
    """A prompt, and what every model said to it."""

    prompt: str
    answers: dict[str, Answer]


def read_prompts(path: Path) -> list[str]:
    """One a line; of a .jsonl, the `prompt` of each object."""
    path = path.expanduser()
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"--prompts {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {path}: this is no UTF-8: {error.reason} at byte {error.start}") from None
    written = [(at, line.rstrip("\r")) for at, line in enumerate(lines, 1) if line.strip()]
    if not written:
        raise InputError(f"--prompts {path}: there is no prompt in it")
    if path.suffix in (".jsonl", ".json"):
        return [_prompt_of(line, f"{path}:{at}") for at, line in written]
    return [line for _, line in written]


def _prompt_of(line: str, where: str) -> str:
    wanted = 'one object a line is wanted, such as {"prompt": "def main("}'
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON: {error}; {wanted}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: no `prompt` with text in it; {wanted}")
    return prompt


def answer_all(
    lineup: Lineup, prompts: Sequence[str], names: Sequence[str], settings: Settings, mode: Mode, screen: Screen
) -> list[Answered]:
    """Each prompt on its own, by every model."""
    found = []
    for at, prompt in enumerate(prompts, 1):
        screen.note(f"{at}/{len(prompts)}")
        found.append(Answered(prompt, {name: _answer(lineup, prompt, name, settings, mode, screen) for name in names}))
    return found


def _answer(lineup: Lineup, prompt: str, name: str, settings: Settings, mode: Mode, screen: Screen) -> Answer:
    with lineup.as_(name) as model:
        ready = prompt_for(model, lineup.tokenizer, mode, (), prompt, name, settings.max_tokens)
        for note in ready.notes:
            screen.note(f"{name}: {note}")
        return answer(model, lineup.tokenizer, ready, settings)
