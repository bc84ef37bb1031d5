"""What a person sees of `plan --fit`: each phase on some hardware, and what to type where it does not fit."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phased_cpt.run_dir import in_bytes
from phased_cpt.tables.words import counted

STYLES = {"fits": "green", "tight": "bold yellow", "does not fit": "bold red", "not known": "bold yellow"}

Facts = dict[str, Any]


def memory_table(facts: Facts) -> RenderableType:
    """A row a phase: what fills a rank's device at its worst moment, the host's share, and the verdict."""
    hardware = facts["hardware"]
    on_gpu = hardware["gpu_bytes"] is not None
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("phase", overflow="fold")
    for heading in (*(["on each GPU", ""] if on_gpu else []), "of the host, each process", "", "verdict"):
        table.add_column(heading, overflow="fold")
    for each in facts["phases"]:
        of_gpu = _estimate(each["device"]) if on_gpu and each["device"]["peak"] else ("?", "")
        of_host = _estimate(each["host"] if on_gpu or each["host"]["peak"] else each["device"])
        who = Text.assemble((each["phase"], "bold cyan"), (f"\n{each['file']}", "dim"))
        table.add_row(who, *(of_gpu if on_gpu else ()), *of_host, _verdict(each))
    if merge := facts["merge"]:
        who = Text.assemble(("merge", "bold"), ("\nafter the last phase", "dim"))
        of_host = _estimate(merge["host"]) if merge["host"]["peak"] else ("?", "")
        table.add_row(who, *(("", "") if on_gpu else ()), *of_host, _verdict(merge))
    return Group(_hardware(hardware), table, *_changes(facts), Text(f"\n{_margin(hardware)}", style="dim"))


def _verdict(found: Facts) -> Text:
    verdict = Text(found["verdict"], style=STYLES[found["verdict"]])
    return Text.assemble(verdict, (f"\n{found['why']}", "dim")) if found["why"] else verdict


def _hardware(hardware: Facts) -> RenderableType:
    nodes = f" on {counted(hardware['nodes'], 'node')}" if hardware["nodes"] > 1 else ""
    gpus = f"a GPU of {in_bytes(hardware['gpu_bytes'])} each" if hardware["gpu_bytes"] is not None else "no GPU"
    host = f"{in_bytes(hardware['host_bytes'])} of memory" if hardware["host_bytes"] else "a host that is not judged"
    return Text(f"{counted(hardware['ranks'], 'rank')}{nodes}, {gpus}, {host}\n")


def _estimate(estimate: Facts) -> tuple[str, str]:
    """The peak with the moment that it is at, and what it is made of, the largest first."""
    parts = sorted(estimate["parts"].items(), key=lambda part: -part[1])
    shown = [f"{name} {in_bytes(size)}" for name, size in parts if size > 0.01 * estimate["peak"]]
    return f"{in_bytes(estimate['peak'])}\n{WHEN.get(estimate['at'], '')}", "\n".join(shown)


WHEN = {
    "load": "while loading",
    "engine": "before the first step",
    "head": "at the loss",
    "layer": "on the way back",
    "end": "at the first layer",
    "step": "in the optimizer's step",
    "save": "saving or evaluating",
    "write": "writing",
    "walk": "checking a layer",
    "walked head": "checking the head",
    "compare": "comparing logits",
    "4 bits": "looking at 4 bits",
    **dict.fromkeys(("choice: weights", "choice: layer", "choice: loss"), "measuring both bases"),
}


def _changes(facts: Facts) -> Iterator[RenderableType]:
    """What to type, once for all phases for which it is the same."""
    alike: dict[str, tuple[list[str], list[Facts]]] = {}
    for each in facts["phases"]:
        if each["changes"]:
            alike.setdefault(str(each["changes"]), ([], each["changes"]))[0].append(each["phase"])
    for names, changes in alike.values():
        fits = any(change["fits"] for change in changes)
        what = "would fit with" if fits else "would not fit with any change that was tried; nearest comes"
        yield Text.assemble("\n", (", ".join(names), "bold cyan"), f" {what}")
        for change in changes:
            tight = ", which is tight" if change["verdict"] == "tight" else ""
            yield Text(f"  {' '.join(change['set'])}   ({in_bytes(change['bytes'])}{tight})")


def _margin(hardware: Facts) -> str:
    room = f"{in_bytes(hardware['room_bytes'])} of it may be used"
    if hardware["gpu_bytes"] is None:
        return f"of its share of the memory a process may use {in_bytes(hardware['room_bytes'])}"
    return f"of a GPU {room}: the rest is for CUDA's own and for what the allocator cannot give"
