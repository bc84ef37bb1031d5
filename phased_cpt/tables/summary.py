"""What a person sees when a run has come to its end, and the same facts for a program."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phased_cpt.plan import Plan
from phased_cpt.published import Source, read_source
from phased_cpt.run_dir import RunDir
from phased_cpt.tables.words import short


def summary_facts(run_dir: RunDir, plan: Plan, trained: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each phase that has published: what it did, and where."""
    found = []
    for phase in plan.phases:
        there = read_source(run_dir.root / phase.folder)
        if there is not None:
            place, source = there
            facts = {"phase": phase.name, "folder": str(place), "trained_now": phase.name in trained}
            found.append(
                facts
                | {key: getattr(source, key) for key in ("step", "steps", "why", "tokens", "seconds", "start", "end")}
            )
    return found


def summary_table(run_dir: RunDir, plan: Plan, trained: tuple[str, ...], places: bool = True) -> RenderableType:
    """A line a phase: perplexity before and after, tokens, time; and where everything is."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("")
    table.add_column("phase")
    for name in ("perplexity", "after", "step", "tokens", "time"):
        table.add_column(name, justify="right")
    for phase in plan.phases:
        there = read_source(run_dir.root / phase.folder)
        if there is not None:
            table.add_row(str(phase.number), phase.name, *_figures(there[1]))
    return Group(table, "", *(_places(run_dir, plan) if places else ()))


def _figures(source: Source) -> tuple[str, ...]:
    worse = source.start and source.end and source.end["eval_loss"] >= source.start["eval_loss"]
    return (
        _perplexity(source.start),
        _perplexity(source.end) + (" (worse)" if worse else ""),
        f"{source.step} of {source.steps}",
        f"{source.tokens:,}",
        clock(source.seconds),
    )


def _perplexity(measured: dict[str, Any]) -> str:
    value = measured.get("perplexity")
    if value is None:
        return "–" if not measured else "beyond numbers"
    return f"{value:,.1f}" if math.isfinite(value) and value < 1e6 else short(value)


def clock(seconds: float) -> str:
    """1:02:03"""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _places(run_dir: RunDir, plan: Plan) -> list[Text]:
    what = {
        "report.html": "what each phase taught, and what it made the model forget: open it in a browser",
        "run.json": "what is done; what a phase has published is in its folder",
        "logs/training.log": "what was told; each phase has logs/train.jsonl and logs/eval.jsonl",
        "tensorboard": "tensorboard --logdir",
        "final_model": "the last weights, with the tokenizer",
        plan.config.merge.output_dir: "the merged model: load it with plain transformers, or `phased-cpt chat`",
    }
    there = [(run_dir.root / name, words) for name, words in what.items() if (run_dir.root / name).exists()]
    return [Text.assemble((str(path), "bold"), f"  {words}") for path, words in there]


def outcome_line(run_dir: RunDir, plan: Plan, trained: tuple[str, ...], finished: bool) -> str:
    """How a call of `run` ended."""
    if finished:
        return f"the run is done: {run_dir.root}\n" if trained else f"nothing to do: {run_dir.root} is done\n"
    told = f"trained {', '.join(trained)}" if trained else "nothing to do here"
    return f"{told}; the rest of the curriculum is still to come: {run_dir.root}\n"


def smoke_line(trained: tuple[str, ...]) -> str:
    """How a smoke run ended."""
    return f"smoke passed: a few steps of {', '.join(trained)}; the folder is removed; without --smoke it trains\n"
