"""What a person sees of a λ-sweep."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

Facts = dict[str, Any]
NAMED = {0.0: "base", 1.0: "as published"}


def sweep_table(facts: Facts) -> RenderableType:
    """A line a λ: losses in nats a token, their mean, and how far the general sets have moved."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("λ")
    general = [each["name"] for each in facts["sets"] if each["kind"] == "general"]
    names = [each["name"] for each in facts["sets"] if each["kind"] == "phase"]
    for name in (*names, "mean", *(f"{name}, drift" for name in general)):
        table.add_column(name, justify="right")
    table.add_column("")
    for line in facts["strengths"]:
        chosen = line["lambda"] == facts["chosen"]
        notes = [NAMED.get(line["lambda"], ""), "← chosen" if chosen else ""]
        cells = [_figure(line["losses"][name]) for name in names]
        cells += [_figure(line["mean"]), *(_figure(line["drift"][name], "+.4f") for name in general)]
        table.add_row(f"{line['lambda']:g}", *cells, " ".join(filter(None, notes)), style="bold" if chosen else "")
    head = f"{facts['phase']}: base + λ · all that was added up to it; held-out loss, nats a token"
    return Group(head, table, f"chosen by {facts['rule']} ({', '.join(facts['mean_of'])})")


def _figure(value: float | None, how: str = ".4f") -> str:
    return "no number" if value is None else format(value, how)
