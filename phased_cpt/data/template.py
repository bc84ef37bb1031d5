"""The chat template of a tokenizer: what it prints of a chat, and which of that the assistant says.

<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
                                                         ──────────────────    a span: its words, and what ends its turn

The template marks them itself ({% generation %} … {% endgeneration %}); else what it prints of the chat up to each turn
says where that begins and ends. Where neither does surely, the chat is refused: a guess would train the wrong words.
"""

import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from phased_cpt.data.records import BadRecord, Fields, cut
from phased_cpt.data.tokenizer import Tokenizer

BEGINS, ENDS = "phased_cpt_said_begins", "phased_cpt_said_ends"  # names of what a marking template prints around it


class Span(NamedTuple):
    """A stretch of a text, in characters."""

    begin: int
    end: int


def filled(tokenizer: Tokenizer, messages: Sequence[Fields], prompt: bool = False, marks: Fields | None = None) -> str:
    """What the template prints. It is a program of somebody's, so it may fail in any way there is."""
    try:
        program, names = _compiled(tokenizer.chat_template or "").program, dict(tokenizer.template_tokens)
        given = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": prompt}
        return str(program.render(**given, **names, **(marks or {})))
    except Exception as error:
        raise BadRecord("messages", f"the chat template of {tokenizer.name} refuses it: {cut(str(error))}") from None


def marks_not_in(text: str) -> tuple[str, str]:
    """Two letters of Unicode's private planes that nobody uses here."""
    free = (chr(point) for point in range(0xF0000, 0x110000) if chr(point) not in text)
    return next(free), next(free)


def said(tokenizer: Tokenizer, messages: Sequence[Fields], text: str) -> tuple[Span, ...]:
    """Where the assistant speaks in `text`, which is what the template prints of the chat."""
    if _compiled(tokenizer.chat_template or "").marks:
        return _marked_by_template(tokenizer, messages, text)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return tuple(_turn(tokenizer, messages, number, text) for number in turns)


# By the marks of the template ----------------------------------------------------------------------------------------


def _marked_by_template(tokenizer: Tokenizer, messages: Sequence[Fields], text: str) -> tuple[Span, ...]:
    """The marks are printed as two letters, and taken out again: a template that prints into a variable is no harm."""
    begins, ends = marks_not_in(text + json.dumps(messages, ensure_ascii=False, default=str))
    parts = re.split(f"([{begins}{ends}])", filled(tokenizer, messages, marks={BEGINS: begins, ENDS: ends}))
    if parts[1::2] != [begins, ends] * (len(parts) // 4) or "".join(parts[::2]) != text:
        raise _unsure(tokenizer, "looks into what it marks by {% generation %}, or marks it twice")
    borders = list(itertools.accumulate(map(len, parts[::2])))
    spans = zip(borders[::2], borders[1::2], strict=False)
    return tuple(Span(begin, end) for begin, end in spans if begin < end)


# By what is printed of the chat up to a turn -------------------------------------------------------------------------


def _turn(tokenizer: Tokenizer, messages: Sequence[Fields], number: int, text: str) -> Span:
    """messages[:n] with the header of the answer … messages[:n + 1]: both must be how the whole chat begins."""
    where, last = f"messages[{number}]", number == len(messages) - 1
    try:
        before = filled(tokenizer, messages[:number], prompt=True)
        after = text if last else filled(tokenizer, messages[: number + 1])
    except BadRecord as bad:
        raise _unsure(tokenizer, f"does not print the chat up to {where} by itself ({cut(bad.reason)})") from None
    for part, up_to in ((before, "up to"), (after, "up to and with")):
        if not text.startswith(part):
            raise _unsure(tokenizer, f"prints the chat {up_to} {where} otherwise than at the beginning of the whole")
    if len(before) > len(after):
        raise _unsure(tokenizer, f"prints less of the chat with {where} than without")
    if before == filled(tokenizer, messages[:number]) and not _speaks_at_once(tokenizer, messages, number, before):
        raise _unsure(tokenizer, f"knows no add_generation_prompt, and may print a header before the words of {where}")
    return Span(len(before), _end_of_turn(tokenizer, after, len(before)))


def _speaks_at_once(tokenizer: Tokenizer, messages: Sequence[Fields], number: int, before: str) -> bool:
    """Whether the words of a turn stand right behind what was printed before it, as in [INST] … [/INST] words."""
    words, _ = marks_not_in(before)
    printed = filled(tokenizer, [*messages[:number], {**messages[number], "content": words}])
    return printed.startswith(before) and printed[len(before) :].lstrip().startswith(words)


def _end_of_turn(tokenizer: Tokenizer, text: str, begin: int) -> int:
    """Behind the special token that ends a turn there may be a line break, which the assistant does not say."""
    end = len(text.rstrip())
    return end if end > begin and text[:end].endswith(tokenizer.specials) else len(text)


def _unsure(tokenizer: Tokenizer, why: str) -> BadRecord:
    what = f"the chat template of {tokenizer.name} {why}, so what the assistant says cannot be told"
    mend = "mark that in chat_template.jinja by {% generation %} … {% endgeneration %}, or take out"
    return BadRecord("messages", f"{what}; {mend} data.assistant_only_loss")


# Compiled ------------------------------------------------------------------------------------------------------------


class _Compiled(NamedTuple):
    program: Any
    marks: bool  # it has {% generation %}


@functools.cache
def _compiled(source: str) -> _Compiled:
    """As transformers compiles it (a test compares them), but for today's date: the same data make the same text."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what the assistant says: with marks, if any are given."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begins, ends = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in (BEGINS, ENDS))
            return [begins, nodes.Scope(body, lineno=line), ends]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    names = environment.parse(source).find_all(nodes.Name)
    return _Compiled(environment.from_string(source), any(name.name == BEGINS for name in names))
