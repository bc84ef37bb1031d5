"""What is seen: text of a model as it is, answers side by side, remarks beside them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phased_cpt.chat.answer import Answer

# All that moves a cursor, paints or reorders: a model may have read such bytes, and says them again.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
NARROWEST = 30  # of columns; below, one answer stands under the other


def clean(text: str) -> str:
    """Text of a model without what a terminal would obey."""
    return UNSAFE.sub("", text)


@dataclass(frozen=True)
class Screen:
    """Answers go to `out`, remarks to `notes`: the same terminal, or apart where answers are kept in a file."""

    out: Console
    notes: Console

    def note(self, text: str) -> None:
        self.notes.print(Text(clean(text), style="dim"))

    def wrong(self, text: str) -> None:
        self.notes.print(Text(clean(text), style="red"))

    def piece(self, text: str) -> None:
        """A part of an answer, as it comes."""
        self.out.out(clean(text), end="", highlight=False)
        self.out.file.flush()

    def end_of_answer(self, answer: Answer) -> None:
        self.out.out("")
        self.note(f"[{answer.told()}]")

    def asked(self, prompt: str) -> None:
        self.out.print(Text(clean(f"> {prompt}"), style="bold", overflow="fold"))

    def side_by_side(self, answers: Mapping[str, Answer]) -> None:
        if self.out.is_terminal and self.out.width // len(answers) >= NARROWEST:
            self.out.print(_columns(answers))
        else:
            self.one_by_one(answers)

    def one_by_one(self, answers: Mapping[str, Answer]) -> None:
        for name, answer in answers.items():
            self.out.out(f"--- {name}: {answer.told()}\n{clean(answer.text)}\n", highlight=False)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2))
        for left, right in rows:
            grid.add_row(Text(clean(left), style="bold"), Text(clean(right), overflow="fold"))
        self.notes.print(grid)


def _columns(answers: Mapping[str, Answer]) -> Table:
    table = Table(expand=True, show_footer=True)
    for name, answer in answers.items():
        table.add_column(Text(name), Text(answer.told(), style="dim"), ratio=1, overflow="fold")
    table.add_row(*(Text(clean(answer.text), overflow="fold") for answer in answers.values()))
    return table
