"""What a run has made, measured: base, every phase, merged.

                 held-out documents of        questions                        tasks
                 foundation   evolution   …   exact   token accuracy   ROUGE-L   acc   …
base             perplexity   perplexity
foundation       perplexity   perplexity
merged           …
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from phased_cpt.config.allowed import nearest
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.evaluate.answers import judged
from phased_cpt.evaluate.course import Course
from phased_cpt.evaluate.held_out import HeldOutSet, held_out_sets, measured
from phased_cpt.evaluate.questions import Question, read_questions
from phased_cpt.evaluate.tasks import Harness
from phased_cpt.model.lineup import Lineup, line_up, read_run
from phased_cpt.tables.evaluation import evaluation_table, valid
from phased_cpt.tables.words import shown
from phased_cpt.wanted import EvaluateWanted

__all__ = ["main"]


def main(wanted: EvaluateWanted) -> int:
    """Measure, and print: a table, or with --json the facts alone."""
    facts = evaluated(wanted)
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n" if wanted.as_json else None
    with contextlib.suppress(BrokenPipeError):  # `phased-cpt evaluate | head`
        sys.stdout.write(text or shown(evaluation_table(facts)))
        sys.stdout.flush()
    return 0


def evaluated(wanted: EvaluateWanted) -> dict[str, Any]:
    """The facts. What was typed is checked, and files are read, before a model is loaded."""
    if wanted.include_path and not wanted.tasks:
        raise InputError("--include-path says where tasks lie; name those that are wanted with --task")
    questions = read_questions(wanted.questions, wanted.limit) if wanted.questions else []
    harness = Harness(wanted.tasks, wanted.include_path, wanted.limit) if wanted.tasks else None
    course = Course()
    sets, why_not = _held_out(wanted, course)
    lineup = line_up(wanted.models, tell=course.tell)
    names = _chosen(lineup.names, wanted.only)
    course.begin(len(names) * (sum(len(each.rows) for each in sets.values()) + len(questions) + len(wanted.tasks)))
    measures = Measures(sets, questions, harness, course)
    try:
        models = {name: measures.of(lineup, name, names[at:]) for at, name in enumerate(names)}
    except torch.OutOfMemoryError:
        raise PhasedCptError(f"{lineup.device} has no room for it; try --4bit, or --device cpu") from None
    finally:
        course.pause()
    skipped = {"held_out": why_not} if why_not else {}
    facts: dict[str, Any] = {"run": str(lineup.root) if lineup.root else None, "models": models, "skipped": skipped}
    if questions:
        facts["questions"] = [asdict(question) for question in questions]
    return valid(facts)


def _held_out(wanted: EvaluateWanted, course: Course) -> tuple[Mapping[str, HeldOutSet], str]:
    """The held-out rows of every phase; or none, and why, if something else is measured."""
    run_dir = wanted.models.run_dir
    known = read_run(run_dir.expanduser().resolve(), wanted.models.base) if run_dir else None
    try:
        if known is None:
            raise InputError("held-out documents are those of a run, and no run is named")
        return held_out_sets(*known, course.watcher), ""
    except InputError as error:
        if not wanted.questions and not wanted.tasks:
            raise InputError(f"{error}\nwhat can be measured without them: --questions FILE, --task NAME") from None
        course.tell(f"held-out perplexity is not measured: {error}")
        return {}, str(error)


def _chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    for name in only:
        if name not in names:
            raise InputError(f"--only {name}: there is {', '.join(names)}{nearest(name, names)}")
    return [name for name in names if not only or name in only]


@dataclass(frozen=True)
class Measures:
    """What is measured on each model."""

    sets: Mapping[str, HeldOutSet]
    questions: Sequence[Question]
    harness: Harness | None
    course: Course

    @property
    def batch_rows(self) -> int:
        """What is known to fit."""
        return max((each.batch_rows for each in self.sets.values()), default=1)

    def of(self, lineup: Lineup, name: str, left: Sequence[str]) -> dict[str, Any]:
        """The facts of one model; only those that are left may still be in memory, and not two where one will do."""
        facts: dict[str, Any] = {}
        lineup.drop_all_but(left)
        with lineup.as_(name) as model:
            self.course.at(name)
            if self.sets:
                facts["held_out"] = measured(model, self.sets, lineup.device, self.course)
            if self.questions:
                facts["questions"] = judged(model, lineup.tokenizer, self.questions, self.course)
            if self.harness:
                facts["tasks"] = self.harness.measured(model, lineup.tokenizer, self.batch_rows, self.course)
        return facts
