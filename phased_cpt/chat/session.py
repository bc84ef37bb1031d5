"""What was asked for on the command line, from the first line on the screen to the last."""

import json
import os
import sys
from dataclasses import asdict
from typing import Any

import transformers
from rich.console import Console

from phased_cpt.chat.batch import answer_all, read_prompts
from phased_cpt.chat.conversation import MODES, Conversation, piped, require_model, talk, typed
from phased_cpt.chat.prompt import Mode, mode_of
from phased_cpt.chat.screen import Screen
from phased_cpt.chat.settings import Settings, changed, told
from phased_cpt.model.lineup import Lineup, line_up
from phased_cpt.wanted import ChatWanted


def serve(wanted: ChatWanted) -> int:
    """A conversation, or a file of prompts and the end."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    settings = _settings(wanted)
    prompts = read_prompts(wanted.prompts) if wanted.prompts else None  # before a model is loaded for minutes
    screen = _screen(apart=prompts is not None or not sys.stdin.isatty())
    screen.note("loading …")
    lineup = line_up(wanted.models, tell=screen.note)
    for name in wanted.compare:
        require_model(name, lineup)
    lineup.load((wanted.compare or (lineup.tuned,))[0])  # now, while somebody waits for it anyway
    mode = mode_of(lineup.tokenizer, plain=wanted.plain)
    try:
        if prompts is None:
            _talk(wanted, lineup, settings, mode, screen)
        else:
            _answer_file(wanted, prompts, lineup, settings, mode, screen)
    except BrokenPipeError:  # `phased-cpt chat --prompts p.txt | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _settings(wanted: ChatWanted) -> Settings:
    """The defaults, with what was typed; a file of prompts is answered with the likeliest tokens."""
    settings = Settings(temperature=0.0) if wanted.prompts else Settings()
    typed_values = {"temperature": wanted.temperature, "max_tokens": wanted.max_tokens, "seed": wanted.seed}
    for name, value in typed_values.items():
        settings = settings if value is None else changed(settings, name, str(value))
    return settings


def _screen(*, apart: bool) -> Screen:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a letter that cannot be read or shown is a question mark
    out = Console(highlight=False, markup=False, emoji=False)
    return Screen(out, Console(stderr=True, highlight=False, markup=False, emoji=False) if apart else out)


def _talk(wanted: ChatWanted, lineup: Lineup, settings: Settings, mode: Mode, screen: Screen) -> None:
    conversation = Conversation(lineup, screen, settings, mode, wanted.compare)
    screen.table(
        [
            ("run" if lineup.root else "model", _what(wanted, lineup)),
            ("models", f"{', '.join(lineup.names)}; {' and '.join(conversation.answering)} will answer"),
            ("mode", MODES[mode]),
            ("settings", told(settings)),
            ("device", str(lineup.device)),
        ]
    )
    screen.note("/help lists the commands; /compare PROMPT asks base and tuned; /quit leaves")
    talk(conversation, typed(screen) if sys.stdin.isatty() else piped())


def _what(wanted: ChatWanted, lineup: Lineup) -> str:
    return str(lineup.root or wanted.models.adapter or wanted.models.model)


def _answer_file(
    wanted: ChatWanted, prompts: list[str], lineup: Lineup, settings: Settings, mode: Mode, screen: Screen
) -> None:
    names = wanted.compare or tuple(dict.fromkeys((lineup.names[0], lineup.tuned)))
    found = answer_all(lineup, prompts, names, settings, mode, screen)
    if wanted.as_json:
        head: dict[str, Any] = {
            "from": _what(wanted, lineup),
            "names": names,
            "mode": mode,
            "settings": asdict(settings),
        }
        facts = [
            {"prompt": each.prompt, "answers": {name: a.facts() for name, a in each.answers.items()}} for each in found
        ]
        sys.stdout.write(json.dumps(head | {"answers": facts}, indent=2, ensure_ascii=False) + "\n")
        sys.stdout.flush()
        return
    for each in found:
        screen.asked(each.prompt)
        screen.side_by_side(each.answers)
