"""The figures of a line by the names that TensorBoard and Weights & Biases show."""

import math

from phased_cpt.tracking.sink import Line

TRAIN = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "hfu", "memory_bytes")
EVALUATION = {"eval_loss": "loss", "perplexity": "perplexity"}


def figures(line: Line) -> dict[str, float]:
    """train/loss, … or eval/<dataset>/loss, …; what is absent, null, NaN or infinite cannot be drawn."""
    names = {f"train/{field}": field for field in TRAIN}
    if is_evaluation(line):
        names = {f"eval/{line['dataset']}/{shown}": field for field, shown in EVALUATION.items()}
    return {name: float(line[field]) for name, field in names.items() if is_finite(line.get(field))}


def is_evaluation(line: Line) -> bool:
    return "eval_loss" in line


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
