"""A record becomes one document. To add a format, write its renderer below another and name it in RENDERERS.

{"training_content": "…"}                   the text as it is
{"messages": [{"role": …, "content": …}]}   a chat, through the tokenizer's own template
{"instruction": …, "input": …, "output": …} the same, as a user's question and its answer
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from phased_cpt.config.allowed import nearest
from phased_cpt.data.records import BadRecord, Fields, cut, kind
from phased_cpt.data.template import Span, filled, marks_not_in, said
from phased_cpt.data.tokenizer import Tokenizer

# Fields that `text_field: auto` looks for, in this order, and nothing else.
AUTO = ("training_content", "text", "messages", "instruction")


class Part(NamedTuple):
    """A stretch of text, and whether special tokens in it are tokens."""

    text: str
    special: bool


class Document(NamedTuple):
    """What is tokenised as one, and the text that it is known by (for the split, and to find duplicates)."""

    parts: tuple[Part, ...]
    identity: str
    said: tuple[Span, ...] = ()  # what the assistant says of the parts' text, where that alone is trained


class Rendering(NamedTuple):
    """How records are to be read; it is part of the name of what is made of them."""

    text_field: str
    where: dict[str, Any]
    parse_special_tokens: bool
    assistant_only: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """Of what is made so; an option that is off is not in it, so that what an older release made is found."""
        return {name: value for name, value in self._asdict().items() if name != "assistant_only" or value}

    @property
    def columns(self) -> set[str]:
        """Every field that can matter."""
        fields = set(AUTO) if self.text_field == "auto" else {self.text_field}
        return fields | set(self.where) | {"instruction", "input", "output", "system"}

    def keeps(self, fields: Fields) -> bool:
        """Whether the record has every value that is asked for."""
        return all(key in fields and _same(fields[key], value) for key, value in self.where.items())


def _same(given: Any, wanted: Any) -> bool:
    """1 is not true, however deep."""
    if isinstance(given, dict) and isinstance(wanted, dict):
        return given.keys() == wanted.keys() and all(_same(given[key], wanted[key]) for key in given)
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    return bool(given == wanted) and isinstance(given, bool) == isinstance(wanted, bool)


def render(fields: Fields, rendering: Rendering, tokenizer: Tokenizer) -> Document | None:
    """The document of a record; None if its text is empty."""
    field = _field(fields, rendering.text_field)
    value = fields[field]
    if value is None:
        raise BadRecord(field, "null; needed is a text")
    return _renderer(field, value)(field, fields, rendering, tokenizer)


def _field(fields: Fields, wanted: str) -> str:
    looked_for = AUTO if wanted == "auto" else (wanted,)
    found = next((field for field in looked_for if field in fields), None)
    if found is None:
        hint = nearest(looked_for[0], list(fields)) if len(looked_for) == 1 else ""
        raise BadRecord("", f"missing field {_either(looked_for)}{hint} ({_there(fields)})")
    return found


def _there(fields: Fields) -> str:
    return f"fields here: {', '.join(map(cut, list(fields)[:8])) or 'none'}"


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))


def _renderer(field: str, value: Any) -> "Renderer":
    if field in RENDERERS:
        return RENDERERS[field]
    return _chat if isinstance(value, list) else _raw


def _raw(field: str, fields: Fields, rendering: Rendering, tokenizer: Tokenizer) -> Document | None:
    text = _text(fields, field)
    if rendering.assistant_only:
        what = "a text, and data.assistant_only_loss trains what the assistant says in chats (messages)"
        raise BadRecord(field, f"{what}; set it in phases of chats alone, or take it out")
    return Document((Part(text, rendering.parse_special_tokens),), text) if text.strip() else None


def _chat(field: str, fields: Fields, rendering: Rendering, tokenizer: Tokenizer) -> Document | None:
    messages = fields[field]
    if not isinstance(messages, list):
        raise BadRecord(field, f"a JSON {kind(messages)}; needed is an array of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRecord(f"{field}[{number}]", 'needed is {"role": "…", "content": "…"}')
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise BadRecord(f"{field}[{number}].content", f"{kind(message.get('content'))}; needed is a text")
    return _through_template(messages, rendering, tokenizer) if messages else None


def _alpaca(field: str, fields: Fields, rendering: Rendering, tokenizer: Tokenizer) -> Document | None:
    """instruction, input and output: as a chat where the tokenizer knows chats, else under plain headings."""
    question, answer = _text(fields, "instruction"), _text(fields, "output")
    given, system = (_text(fields, name) if fields.get(name) is not None else "" for name in ("input", "system"))
    if not (question + given + answer).strip():
        return None
    identity = json.dumps([system, question, given, answer])
    if tokenizer.chat_template:
        user = f"{question}\n\n{given}" if given else question
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        messages = [{"role": "system", "content": system}] * bool(system) + messages
        chat = _through_template(messages, rendering, tokenizer)
        return chat and chat._replace(identity=identity)
    headed = {"Instruction": question, "Input": given, "Response": answer}
    text = "\n\n".join([system] * bool(system) + [f"### {name}:\n{part}" for name, part in headed.items() if part])
    said_last = Span(len(text) - len(answer), len(text))
    return Document((Part(text, False),), identity, (said_last,) if answer else ())


def _text(fields: Fields, field: str) -> str:
    if field not in fields:
        raise BadRecord("", f"missing field {field!r} ({_there(fields)})")
    value = fields[field]
    if not isinstance(value, str):
        raise BadRecord(field, f"a JSON {kind(value)}; needed is a text")
    return value


Renderer = Callable[[str, Fields, Rendering, Tokenizer], Document | None]
RENDERERS: dict[str, Renderer] = {
    "training_content": _raw,
    "text": _raw,
    "messages": _chat,
    "instruction": _alpaca,
}


# Chat templates ------------------------------------------------------------------------------------------------------


def _through_template(messages: list[Fields], rendering: Rendering, tokenizer: Tokenizer) -> Document | None:
    if tokenizer.chat_template is None:
        advice = "give model.tokenizer one with a chat_template, or the rendered chats as text"
        raise BadRecord("messages", f"the tokenizer {tokenizer.name} has no chat template; {advice}")
    identity = json.dumps(messages, ensure_ascii=False, default=str)
    text = filled(tokenizer, messages)
    if not text.strip():
        return None
    spans = said(tokenizer, messages, text) if rendering.assistant_only else ()
    before, behind = marks_not_in(text + identity)
    marked = _marked(messages, before, behind, tokenizer)
    if marked == messages:
        return Document((Part(text, special=True),), identity, spans)
    return Document(_quoting(filled(tokenizer, marked), before, behind, text), identity, spans)


def _quoting(marked: str, before: str, behind: str, text: str) -> tuple[Part, ...]:
    """A special token that a person wrote is no token: it is marked, rendered, and found again by its marks.

    A template that looks into what it prints may see the marks; then its text is another one, and is not used.
    """
    parts = re.split(f"([{before}{behind}])", marked)
    if parts[1::2] != [before, behind] * (len(parts) // 4) or "".join(parts[::2]) != text:
        what = "the chat template looks into a message that quotes a special token, so which is which cannot be told"
        raise BadRecord("messages", f"{what}; take the token out of the message")
    return tuple(Part(part, special=at % 2 == 0) for at, part in enumerate(parts[::2]) if part)


def _marked(value: Any, before: str, behind: str, tokenizer: Tokenizer) -> Any:
    """The messages, with marks around the special tokens that people wrote into them."""
    if isinstance(value, str):
        return tokenizer.quoted(value, before, behind)
    how = before, behind, tokenizer
    if isinstance(value, list):
        return [_marked(each, *how) for each in value]
    return (
        {_marked(key, *how): _marked(each, *how) for key, each in value.items()} if isinstance(value, dict) else value
    )
