"""What a person sees of a preflight: the checks, and what the run will need of this machine."""

from datetime import timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phased_cpt.run_dir import in_bytes
from phased_cpt.tables.words import counted

STYLES = {"ok": "green", "skip": "dim", "warn": "bold yellow", "fail": "bold red"}

Facts = dict[str, Any]


def checks_table(checks: list[Facts]) -> RenderableType:
    """A line for each finding; a check that has several is named once."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("", "check", "found", "fix"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("", "check"))
    before = None
    for check in checks:
        name = "" if check["name"] == before else check["name"]
        verdict, before = check["verdict"], check["name"]
        table.add_row(Text(verdict, style=STYLES[verdict]), name, check["found"], Text(check["fix"], style="bold"))
    counts = {verdict: sum(check["verdict"] == verdict for check in checks) for verdict in STYLES}
    told = " · ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return Group(table, Text(f"\n{told}", style="dim"))


def fit_table(fit: Facts) -> RenderableType:
    """The hardware; what each phase needs of it and how long it takes; what will lie on the disk."""
    return Group(*(part for part in (_hardware(fit), _phases(fit), _disk(fit)) if part is not None))


def _hardware(fit: Facts) -> RenderableType:
    hardware, gpus = fit["hardware"], fit["gpus"] or []
    if hardware is None:
        return Text("hardware: not known", style="dim")
    each = f" of {in_bytes(hardware['gpu_bytes'])}" if hardware["gpu_bytes"] else ""
    named = ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus))
    where = f"{named}{each}" if gpus else "no GPU"
    nodes = f" on {counted(hardware['nodes'], 'node')}" if hardware["nodes"] > 1 else ""
    return Text(
        f"{counted(hardware['ranks'], 'rank')}{nodes} · {where} · {in_bytes(hardware['host_bytes'])} of memory\n"
    )


def _phases(fit: Facts) -> RenderableType | None:
    if not fit["phases"]:
        return None
    times = {each["phase"]: each for each in fit["time"] or []}
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    places = {"device": "of each GPU"} if fit["gpus"] else {}
    places["host"] = "of the host, each rank"
    for heading in ("phase", "DeepSpeed file", *places.values(), "verdict", "time"):
        table.add_column(heading, justify="right" if heading in places.values() else "left")
    for each in fit["phases"]:
        table.add_row(
            Text(each["phase"], style="bold cyan"),
            f"{each['file']} (ZeRO-{each['zero_stage']})",
            *(in_bytes(each[place]["peak"]) for place in places),
            each["verdict"],
            _time(times.get(each["phase"])),
        )
    return table


def _time(time: Facts | None) -> Text:
    if time is None or time["seconds"] is None:
        return Text(f"? ({time['from']})" if time and time["from"] else "?", style="dim")
    return Text.assemble(str(timedelta(seconds=round(time["seconds"]))), (f" ({time['from']})", "dim"))


def _disk(fit: Facts) -> RenderableType | None:
    if not fit["disk"]:
        return None
    parts = " · ".join(f"{in_bytes(need['bytes'])} {need['what']}" for need in fit["disk"] if need["bytes"])
    return Text(f"\ndisk: {in_bytes(sum(need['bytes'] for need in fit['disk']))} at the most: {parts}")
