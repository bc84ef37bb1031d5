"""What a person sees of an evaluation: a line a model, a column a measure."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from phased_cpt.tables.words import counted, short

QUESTIONS = {"exact_match": "exact match", "token_accuracy": "token accuracy", "rouge_l": "ROUGE-L"}

Facts = dict[str, Any]


def evaluation_table(facts: Facts) -> RenderableType:
    """Each kind of measure that was taken."""
    models: dict[str, Facts] = facts["models"]
    drawn = {"held_out": _held_out, "questions": _questions, "tasks": _tasks}
    parts: list[RenderableType] = []
    for kind, draw in drawn.items():
        if kind in next(iter(models.values())):
            parts += [*draw(models), ""]
    parts += [f"{kind.replace('_', '-')} perplexity is not measured: {why}" for kind, why in facts["skipped"].items()]
    return Group(*parts)


def valid(facts: Facts) -> Facts:
    """JSON knows no infinity, and not what is no number."""
    return {key: _valid(value) for key, value in facts.items()}


def _valid(value: Any) -> Any:
    if isinstance(value, dict):
        return valid(value)
    if isinstance(value, list | tuple):
        return [_valid(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(columns: list[str]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("model")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _held_out(models: dict[str, Facts]) -> tuple[str, Table]:
    first = next(iter(models.values()))["held_out"]
    tokens = ", ".join(f"{found['tokens']:,} of {name}" for name, found in first.items())
    table = _table(list(first))
    for name, facts in models.items():
        table.add_row(name, *(_perplexity(found) for found in facts["held_out"].values()))
    return f"perplexity of held-out documents ({tokens} tokens)", table


def _perplexity(found: Facts) -> str:
    value = found["perplexity"]
    if value is None:
        return "beyond numbers" if found["eval_loss"] is not None else "no number"
    return f"{value:,.1f}" if value < 1e6 else short(value)


def _questions(models: dict[str, Facts]) -> tuple[str, Table]:
    asked = next(iter(models.values()))["questions"]["questions"]
    table = _table(list(QUESTIONS.values()))
    for name, facts in models.items():
        table.add_row(name, *(_share(facts["questions"][key]) for key in QUESTIONS))
    return f"answers to {counted(asked, 'question')}", table


def _tasks(models: dict[str, Facts]) -> tuple[str, Table]:
    first = next(iter(models.values()))["tasks"]
    columns = [(task, key) for task, figures in first.items() for key in figures if "_stderr" not in key]
    table = _table([f"{task} {key}" for task, key in columns])
    for name, facts in models.items():
        table.add_row(name, *(_with_error(facts["tasks"].get(task, {}), key) for task, key in columns))
    return "tasks of lm-evaluation-harness", table


def _with_error(figures: Facts, key: str) -> str:
    metric, comma, how = key.partition(",")
    error = figures.get(f"{metric}_stderr{comma}{how}")
    return _share(figures.get(key)) + (f" ± {error:.3f}" if error is not None else "")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
