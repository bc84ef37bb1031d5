"""What a person sees of the forgetting matrix; forgetting.json holds the same facts for a program."""

import json
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phased_cpt.run_dir import RunDir
from phased_cpt.tables.summary import clock

Facts = dict[str, Any]
FELL, ROSE = "green", "bold yellow"
NOTICED = 0.01  # nats a token


def read_forgetting(run_dir: RunDir) -> Facts | None:
    """The matrix of a run; None where nothing was measured, or nothing can be read."""
    try:
        return dict(json.loads(run_dir.forgetting.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def forgetting_table(facts: Facts) -> RenderableType:
    """The loss of every set after every phase, and what follows from it."""
    note = Text("held-out loss, nats a token; in brackets against the row above", style="dim")
    against = ["", _controls(facts)] if facts["controls"] else []
    return Group(note, _rows(facts), "", _measures(facts), *against, "", _cost(facts), "")


def _rows(facts: Facts) -> RenderableType:
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("after")
    for each in facts["sets"]:
        table.add_column(each["name"] + (" (general)" if each["kind"] == "general" else ""), justify="right")
    above: Facts = {}
    for row in facts["rows"]:
        cells = [_cell(row["losses"][each["name"]], above.get(each["name"])) for each in facts["sets"]]
        table.add_row(Text(row["after"] or "base", style="bold cyan" if row["after"] else "bold"), *cells)
        above |= {name: loss for name, loss in row["losses"].items() if loss is not None}
    return table


def _cell(loss: float | None, above: float | None) -> Text:
    if loss is None:
        return Text("–", style="dim")
    shown = Text(f"{loss:.4f}")
    if above is not None:
        change = loss - above
        style = FELL if change < -NOTICED else ROSE if change > NOTICED else "dim"
        shown.append(f" ({change:+.3f})", style=style)
    return shown


def _measures(facts: Facts) -> RenderableType:
    """A line a set; positive transfer is good, positive forgetting is not."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("")
    columns = ("base", "best", "final", "backward_transfer", "forward_transfer", "forgetting", "drift")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for name, each in facts["measures"]["sets"].items():
        table.add_row(name, *(_figure(key, each.get(key)) for key in columns))
    mean = facts["measures"]["mean"] | {"drift": facts["measures"]["mean"]["general_drift"]}
    table.add_row(Text("mean", style="bold"), *(_figure(key, mean.get(key)) for key in columns))
    return table


def _controls(facts: Facts) -> RenderableType:
    """What phases have made the model forget, against the same steps on what came before them."""
    names = [each["name"] for each in facts["sets"] if each["kind"] == "phase"]
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    for name in ("against its control", *names):
        table.add_column(name, justify="left" if name == "against its control" else "right")
    for phase, control in facts["controls"].items():
        cells = (_figure("forgetting", control["forgetting"].get(name)) for name in names)
        table.add_row(Text(phase, style="bold cyan"), *cells)
    return table


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if key in ("base", "best", "final") else f"{value:+.4f}"


def _cost(facts: Facts) -> Text:
    cost = facts["cost"]
    return Text(f"measured in {clock(cost['seconds'])}, {cost['share']:.1%} of the time of the phases", style="dim")
