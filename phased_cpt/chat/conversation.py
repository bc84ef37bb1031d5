"""A conversation: lines come in, answers and remarks go out, until somebody leaves."""

import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from phased_cpt.chat.answer import Answer, Stop, answer, stopped_by_ctrl_c
from phased_cpt.chat.prompt import Mode, Turn, prompt_for
from phased_cpt.chat.screen import Screen
from phased_cpt.chat.settings import LIMITS, Settings, changed, told
from phased_cpt.config.allowed import nearest
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.model.lineup import Lineup

BARE_QUITS = ("quit", "exit", "q")
HINT = "Ctrl-C once more, Ctrl-D or /quit leaves; Ctrl-C during an answer stops the answer"


class Leave(Exception):  # noqa: N818 - nothing went wrong
    """Somebody wants to go."""


class Conversation:
    """Which models answer, how, and what was said so far."""

    def __init__(
        self, lineup: Lineup, screen: Screen, settings: Settings, mode: Mode, compare: tuple[str, ...] = ()
    ) -> None:
        self.lineup, self.screen = lineup, screen
        self.settings = self.defaults = settings
        self.mode: Mode = mode
        self.compared = two_at_least(compare, lineup)
        self.answering = compare or (lineup.tuned,)
        self.turns: list[Turn] = []
        self._noted: set[str] = set()  # of the prompt that is being answered

    def line(self, text: str) -> None:
        """One line that was typed: a command, or a prompt for whoever answers."""
        if not text.strip():
            return
        if text.strip() in BARE_QUITS:
            raise Leave
        if command := re.match(r"/([A-Za-z]\w*)(?:\s+(.*))?\s*$", text, re.DOTALL):
            self._command(command[1], (command[2] or "").strip())
        else:
            self._ask(text, self.answering)

    def _command(self, name: str, rest: str) -> None:
        if name not in COMMANDS:
            known = nearest(f"/{name}", [f"/{known}" for known in COMMANDS])
            raise InputError(
                f"there is no command /{name}{known}; /help lists them. A blank before it makes it a prompt"
            )
        COMMANDS[name][0](self, rest)

    # Answers ---------------------------------------------------------------------------------------------------------

    def _ask(self, prompt: str, names: tuple[str, ...], *, again: bool = False) -> None:
        """The answers of these models; `again`: to the last prompt, in place of or beside what was said to it."""
        earlier = self.turns[:-1] if again else self.turns
        turn = self.turns[-1] if again else Turn(prompt)
        self._noted = set()
        with stopped_by_ctrl_c() as stop:
            if len(names) == 1:
                found = self._streamed(prompt, names[0], earlier, stop)
            else:
                found = self._beside(prompt, names, earlier, stop)
        turn.answers |= {name: each.text for name, each in found.items()}
        self.turns = [*earlier, turn]

    def _streamed(self, prompt: str, name: str, earlier: list[Turn], stop: Stop) -> dict[str, Answer]:
        found = self._answer(prompt, name, earlier, stop, self.screen.piece)
        self.screen.end_of_answer(found)
        return {name: found}

    def _beside(self, prompt: str, names: tuple[str, ...], earlier: list[Turn], stop: Stop) -> dict[str, Answer]:
        found: dict[str, Answer] = {}
        with self._waiting() as show:
            for name in names:
                if not stop.asked:
                    found[name] = self._answer(prompt, name, earlier, stop, _counted(show, name))
        self.screen.side_by_side(found)
        return found

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[Callable[[str], object]]:
        """Shows who is at it, where there is a terminal to show it on."""
        if not self.screen.out.is_terminal:
            yield lambda said: None
            return
        with self.screen.out.status("") as status:
            yield status.update

    def _answer(self, prompt: str, name: str, earlier: list[Turn], stop: Stop, say: Callable[[str], object]) -> Answer:
        with self.lineup.as_(name) as model:
            tokenizer = self.lineup.tokenizer
            ready = prompt_for(model, tokenizer, self.mode, earlier, prompt, name, self.settings.max_tokens)
            for note in sorted({*ready.notes} - self._noted):
                self.screen.note(f"[{note}]")
            self._noted |= {*ready.notes}  # models that are compared read the same
            return answer(model, tokenizer, ready, self.settings, say=say, stop=stop)

    # Commands --------------------------------------------------------------------------------------------------------

    def compare(self, rest: str) -> None:
        """Names change who is compared, and ask the last prompt again; anything else is a prompt."""
        if len(self.lineup.names) == 1:
            what = f"only {self.lineup.names[0]} is loaded, and there is nothing to compare it with"
            raise InputError(f"{what}; a run (--run-dir) or an --adapter has its base beside it")
        names = tuple(dict.fromkeys(rest.split()))
        prompt = rest if rest and not self._are_names(names) else ""
        if names and not prompt:
            self.compared = two_at_least(names, self.lineup)
        if prompt or self.turns:
            self._ask(prompt or self.turns[-1].prompt, self.compared, again=not prompt)
        else:
            self.screen.note(f"{' and '.join(self.compared)} are compared: type a prompt, or /compare PROMPT")

    def _are_names(self, words: tuple[str, ...]) -> bool:
        """Whether these are names of models; with one of them misspelt beside others, it is told."""
        known = [word for word in words if word in self.lineup.names]
        near = [word for word in words if word not in known and nearest(word, self.lineup.names)]
        if known and near and len(known) + len(near) == len(words):
            require_model(near[0], self.lineup)
        return bool(words) and len(known) == len(words)

    def use(self, rest: str) -> None:
        names = tuple(dict.fromkeys(rest.split()))
        if not names:
            raise InputError(f"/use takes a name: {', '.join(self.lineup.names)}")
        for name in names:
            require_model(name, self.lineup)
        self.answering = names
        self.screen.note(f"{' and '.join(names)} will answer")

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not value.strip():
            raise InputError(f"/set takes a name and a value: /set temperature 0.2; there are {', '.join(LIMITS)}")
        self.settings = changed(self.settings, name, value.strip())
        self.screen.note(told(self.settings))

    def set_mode(self, rest: str) -> None:
        if rest == "chat" and not self.lineup.tokenizer.chat_template:
            raise InputError("/mode chat: this model's tokenizer has no chat template")
        if rest not in ("chat", "plain"):
            raise InputError(f"/mode takes chat or plain; it is {self.mode}")
        self.mode = "chat" if rest == "chat" else "plain"
        self.turns = []
        self.screen.note(MODES[self.mode])

    def params(self, rest: str) -> None:
        values = {name: getattr(self.settings, name) for name in LIMITS}
        self.screen.table([(f"{name} {values[name]:g}", f"{limit.does} ({limit})") for name, limit in LIMITS.items()])
        self.screen.table([("answering", ", ".join(self.answering)), ("compared", ", ".join(self.compared))])
        self.screen.table([("mode", MODES[self.mode])])

    def reset(self, rest: str) -> None:
        self.settings = replace(self.defaults)
        self.turns = []
        self.screen.note(f"as at the beginning: {told(self.settings)}; what was said is forgotten")

    def help(self, rest: str) -> None:
        self.screen.table([(shown or f"/{name}", does) for name, (_, shown, does) in COMMANDS.items() if does])
        self.screen.note(f"models: {', '.join(self.lineup.names)}; a line that is no command is a prompt. {HINT}")

    def leave(self, rest: str) -> None:
        raise Leave


def two_at_least(names: tuple[str, ...], lineup: Lineup) -> tuple[str, ...]:
    """One name stands beside the base; the base, or no name, beside what was tuned."""
    return names if len(names) > 1 else tuple(dict.fromkeys((lineup.names[0], *names, lineup.tuned)))[:2]


def require_model(name: str, lineup: Lineup) -> None:
    if name not in lineup.names:
        raise InputError(f"there is no model {name}{nearest(name, lineup.names)}; there is {', '.join(lineup.names)}")


def _counted(show: Callable[[str], object], name: str) -> Callable[[str], object]:
    """Shows how many pieces of an answer have come."""
    pieces = itertools.count(1)
    return lambda piece: show(f"{name}: {next(pieces)}")


MODES: dict[Mode, str] = {
    "chat": "chat: the conversation is kept, and written by the tokenizer's chat template; not so with /mode plain",
    "plain": "plain: each prompt is continued as it stands, and nothing of the ones before is seen",
}
Command = tuple[Callable[[Conversation, str], None], str, str]
COMMANDS: dict[str, Command] = {
    "compare": (Conversation.compare, "/compare [PROMPT]", "base and tuned side by side: a prompt, or the last again"),
    "use": (Conversation.use, "/use NAME …", "who answers from now on; several names answer side by side"),
    "set": (Conversation.set, "/set NAME VALUE", f"change a setting: {', '.join(LIMITS)}"),
    "params": (Conversation.params, "/params", "the settings, and what they may be"),
    "mode": (Conversation.set_mode, "/mode chat|plain", "with the chat template, or plain continuation"),
    "reset": (Conversation.reset, "/reset", "settings as at the beginning, conversation forgotten"),
    "help": (Conversation.help, "/help", "this list"),
    "quit": (Conversation.leave, "/quit", "leave; so do /exit, quit, exit, q and Ctrl-D"),
    "exit": (Conversation.leave, "", ""),
}


def talk(conversation: Conversation, lines: Iterator[str]) -> None:
    """Every line to its end; what cannot be done is said, and the next line comes."""
    with contextlib.suppress(Leave):
        for line in lines:
            try:
                conversation.line(line)
            except PhasedCptError as error:
                conversation.screen.wrong(str(error))
            except KeyboardInterrupt:  # the second one, which did not wait for the next token
                if not sys.stdin.isatty():
                    raise
                conversation.screen.note("\n[stopped]")


def typed(screen: Screen) -> Iterator[str]:
    """Lines from a terminal, edited by readline; Ctrl-C clears one, and a second one leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() has arrow keys and a history by it
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            screen.notes.print()
            return
        except KeyboardInterrupt:
            screen.notes.print()
            if interrupted:
                return
            interrupted = True
            screen.note(HINT)
            continue
        interrupted = False
        yield line


def piped() -> Iterator[str]:
    """Lines from a file or another program."""
    for line in sys.stdin:
        yield line.rstrip("\n")
