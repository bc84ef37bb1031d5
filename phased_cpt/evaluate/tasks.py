"""Tasks of lm-evaluation-harness, on the models that are loaded already."""

import contextlib
import importlib.util
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phased_cpt.config.allowed import nearest
from phased_cpt.errors import InputError
from phased_cpt.evals.heldout import measuring
from phased_cpt.evaluate.course import Course


class Harness:
    """The tasks that are wanted, known by their names."""

    def __init__(self, tasks: Sequence[str], include_path: Path | None, limit: int | None) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("--task needs lm-evaluation-harness: pip install 'phased-cpt[lm-eval]'")
        if include_path is not None and not include_path.expanduser().is_dir():
            raise InputError(f"--include-path {include_path}: no such folder (looked from {Path.cwd()})")
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        folder = str(include_path.expanduser().resolve()) if include_path else None
        self.manager = TaskManager(include_path=folder)  # reads the names of its thousands of tasks: five seconds
        self.tasks, self.limit = list(tasks), limit
        for task in tasks:
            if task not in self.manager.all_tasks:
                hint = nearest(task, self.manager.all_tasks)
                raise InputError(f"--task {task}: no such task{hint}; --include-path DIR adds your own")
        self._require_loadable()

    def _require_loadable(self) -> None:
        """Their data is fetched before a model is loaded."""
        for task in self.tasks:
            try:
                self.manager.load([task])
            except Exception as error:  # each task has its own ways
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise InputError(f"--task {task}: the harness cannot load it: {reason}") from None

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_rows: int, course: Course
    ) -> dict[str, dict[str, float]]:
        """The figures of every task, by the harness's own names."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        course.pause()  # it draws bars of its own
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_rows)
        with contextlib.redirect_stdout(sys.stderr), measuring(model):
            found = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=self.tasks,
                task_manager=self.manager,
                limit=self.limit,
                log_samples=False,
            )
        course.advance("tasks", len(self.tasks))
        return {task: _figures(figures) for task, figures in found["results"].items()}


def _figures(figures: dict[str, Any]) -> dict[str, float]:
    """acc,none → acc; acc_stderr,none → acc_stderr; what is no number is left out."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in figures.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
