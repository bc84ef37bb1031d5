"""What happens around the steps of a phase, with its losses written on the page."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from phased_cpt.errors import Diverged
from phased_cpt.evals.heldout import Measured
from phased_cpt.schedule import Cooling, Schedule
from phased_cpt.stopping import Wish
from phased_cpt.train.standing import Standing
from phased_cpt.train.watch import MOST_SKIPPED, Course, Watch


@dataclass
class Heard:
    """Whoever listens."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def train(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def evaluated(self, line: dict[str, Any]) -> None:
        self.evaluations.append(line)

    def tell(self, message: str) -> None:
        self.told.append(message)


@dataclass
class Phase:
    """A phase that takes its steps in no time."""

    losses: list[float] = field(default_factory=list)  # held-out, from step 0 on
    patience: int | None = None
    steps: int = 6
    evaluated_at: frozenset[int] = frozenset()
    skips: frozenset[int] = frozenset()
    gradients: dict[int, float] = field(default_factory=dict)
    heard: Heard = field(default_factory=Heard)
    kept: list[int] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    saved_every: int = 50
    wishes: dict[int, Wish] = field(default_factory=dict)
    saved: list[int] = field(default_factory=list)
    standing: Standing = field(default_factory=Standing)
    schedule: Schedule | None = None
    cooldown_ratio: float = 0.0

    def go(self) -> int:
        """Returns the step at which it ended."""
        state, control = SimpleNamespace(global_step=0), SimpleNamespace(should_training_stop=False)
        measured: Iterator[float] = iter(self.losses)
        main = "evolution" if self.losses else None
        self.watch = Watch(
            course=Course(
                "evolution",
                self.steps,
                self.evaluated_at,
                main,
                {},
                self.patience,
                4,
                8,
                later_steps=12.0,
                saved_every=self.saved_every,
                schedule=self.schedule or Schedule("constant", 1e-3, self.steps),
                cooldown_ratio=self.cooldown_ratio,
            ),
            standing=self.standing,
            listener=self.heard,
            at_begin=lambda: None,
            ready=lambda: None,
            evaluate=lambda: {"evolution": Measured(next(measured), 100)} if self.losses else {},
            check=self.checked.append,
            keep_best=lambda: self.kept.append(self.standing.best.step),  # type: ignore[union-attr]
            tokens_of_step=lambda: 50,
            utilisation=lambda speed: {},
            skipped=lambda: state.global_step in self.skips,
            wished=lambda step: self.wishes.get(step, Wish.NOTHING),
            save=lambda: self.saved.append(self.standing.step),
        )
        self.watch.on_train_begin(None, state, control)
        for step in range(self.standing.step + 1, self.steps + 1):
            self.watch.on_step_begin(None, state, control)
            state.global_step = step
            self.watch.on_step_end(None, state, control)
            logs = {"loss": 3.0, "learning_rate": 1e-3, "grad_norm": self.gradients.get(step, 1.0)}
            self.watch.on_log(None, state, control, logs)
            if control.should_training_stop:
                return step
        return self.steps


@pytest.mark.requirement("T-09")
@pytest.mark.parametrize(
    ("patience", "end", "kept"),
    [(None, 6, [1, 2, 6]), (2, 4, [1, 2]), (3, 5, [1, 2]), (4, 6, [1, 2, 6])],
)
def test_a_phase_stops_where_its_loss_has_not_fallen_for_so_many_evaluations(
    patience: int | None, end: int, kept: list[int]
) -> None:
    phase = Phase([5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 2.9], patience, evaluated_at=frozenset(range(1, 7)))
    assert phase.go() == end
    assert phase.kept == kept
    assert phase.standing.stopped_early == (end < 6)
    assert any("stopped at step" in message for message in phase.heard.told) == (end < 6)


LONG = {"steps": 100, "evaluated_at": frozenset(range(5, 101, 5)), "cooldown_ratio": 0.1}
WORSE = [5.0, 4.0, 3.0, 3.5, 3.4]  # before it, and at steps 5 to 20


@pytest.mark.requirement("T-09")
def test_out_of_patience_a_phase_cools_down_is_measured_and_stops() -> None:
    """Patience is out at step 20; ten steps later it ends, with the best weights of all, which came on the way."""
    phase = Phase([*WORSE, 2.5, 2.6], patience=2, **LONG)  # type: ignore[arg-type]
    assert phase.go() == 30
    assert phase.kept == [5, 10, 25]
    assert (phase.standing.stopped_early, phase.standing.cooling) == (True, Cooling(20, 10))
    assert phase.heard.evaluations[-1]["step"] == 30
    assert phase.heard.told[-2:] == [
        "evolution: 2 evaluations without a loss below 3.0000 (step 10); the learning rate falls from 0.001 to 0, "
        "and it stops at step 30",
        "evolution: stopped at step 30, its learning rate cooled down",
    ]
    assert phase.heard.lines[24]["progress_pct"] == pytest.approx(83.33), "of the thirty that are left to it"
    at_once = Phase(WORSE, patience=2, **LONG | {"cooldown_ratio": 0.0})  # type: ignore[arg-type]
    assert (at_once.go(), at_once.standing.cooling) == (20, None), "the control"


def test_a_phase_is_measured_at_the_end_of_its_cool_down_whenever_that_is() -> None:
    phase = Phase([*WORSE[:3], 3.5, 3.1, 3.2, 3.3], patience=1, **LONG | {"cooldown_ratio": 0.8})  # type: ignore[arg-type]
    assert phase.go() == 27, "15 and 12 more"
    assert [line["step"] for line in phase.heard.evaluations] == [0, 5, 10, 15, 20, 25, 27]


def test_steps_that_overflow_do_not_cool_anything_down() -> None:
    phase = Phase([*WORSE, 3.5, 3.5, 3.5], patience=2, skips=frozenset({3, 22, 24}), **LONG)  # type: ignore[arg-type]
    assert (phase.go(), phase.standing.cooling) == (32, Cooling(19, 10)), "19 were taken, and ten more"


def test_where_the_rate_is_low_already_a_phase_stops_at_once() -> None:
    low = Schedule("linear", 1e-3, 21)
    phase = Phase(WORSE, patience=2, schedule=low, **LONG | {"steps": 21})  # type: ignore[arg-type]
    assert (phase.go(), phase.standing.cooling) == (20, None)


def test_a_phase_goes_on_in_its_cool_down_and_never_begins_another() -> None:
    begun = Phase(WORSE, patience=2, wishes={20: Wish.STOP}, **LONG)  # type: ignore[arg-type]
    assert (begun.go(), begun.saved) == (20, [20])
    there = Standing.parse(begun.standing.text())
    assert there == begun.standing and there.cooling == Cooling(20, 10)
    phase = Phase([3.6, 3.7], patience=2, standing=there, **LONG)  # type: ignore[arg-type]
    assert (phase.go(), phase.standing.cooling) == (30, Cooling(20, 10))
    older = {key: value for key, value in json.loads(begun.standing.text()).items() if key != "cooling"}
    assert Standing.parse(json.dumps(older)).cooling is None, "of a version that knew of none"


def test_what_a_phase_begins_with_is_measured_and_is_not_its_best() -> None:
    phase = Phase([1.0, 4.0, 4.5], evaluated_at=frozenset({3, 6}))
    phase.go()
    assert [line["step"] for line in phase.heard.evaluations] == [0, 3, 6]
    assert (phase.standing.best.step, phase.kept) == (3, [3])  # type: ignore[union-attr]


def test_a_phase_without_held_out_documents_says_so_and_goes_its_way() -> None:
    phase = Phase(evaluated_at=frozenset({3, 6}))
    assert phase.go() == 6
    assert (phase.heard.evaluations, phase.standing.best) == ([], None)
    assert "no held-out documents" in phase.heard.told[0]


@pytest.mark.requirement("T-10")
def test_a_line_says_how_far_it_is_and_what_is_left() -> None:
    phase = Phase()
    phase.go()
    halfway = phase.heard.lines[2]
    assert (halfway["step"], halfway["progress_pct"], halfway["epoch"], halfway["tokens_seen"]) == (3, 50.0, 1.5, 150)
    seconds = 3 / (halfway["tokens_per_second"] / 50)  # of three steps
    assert halfway["eta_seconds"] == pytest.approx(seconds, abs=0.1)
    assert halfway["curriculum_eta_seconds"] == pytest.approx(5 * seconds, abs=0.1), "twelve steps are still to come"


def test_steps_that_overflow_are_counted_and_are_none() -> None:
    phase = Phase(skips=frozenset({1, 2, 4}), gradients={1: float("inf"), 2: float("nan"), 4: float("inf")})
    phase.go()
    assert phase.standing.skipped_steps == 3
    assert phase.checked == [1, 2, 3], "the steps that were taken"
    assert phase.heard.told[-1] == "evolution: step 4 was skipped (fp16 overflow, 3 so far)"


def test_a_scale_that_is_never_found_ends_training() -> None:
    never = frozenset(range(1, 1000))
    with pytest.raises(
        Diverged, match=f"step {MOST_SKIPPED}: in the last {MOST_SKIPPED} steps the gradient is not finite"
    ):
        Phase(steps=MOST_SKIPPED + 1, skips=never).go()
    now_and_then = frozenset(step for step in never if step % MOST_SKIPPED)
    assert Phase(steps=3 * MOST_SKIPPED, skips=now_and_then).go() == 3 * MOST_SKIPPED, "the control"


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    phase = Phase([5.0, float("nan"), 4.0, float("nan")], evaluated_at=frozenset({2, 4, 6}))
    phase.go()
    assert phase.kept == [4]


@pytest.mark.parametrize("gradient", [float("inf"), float("nan"), -1.0])
def test_a_gradient_that_is_not_finite_ends_training(gradient: float) -> None:
    with pytest.raises(Diverged, match="step 2: the gradient is not finite"):
        Phase(gradients={2: gradient}).go()


def test_a_checkpoint_is_made_every_so_many_steps_and_where_one_is_asked_for() -> None:
    """At the end there is none: what the phase has come to is published in a moment."""
    phase = Phase(saved_every=2)
    assert (phase.go(), phase.saved, phase.watch.is_stopped) == (6, [2, 4], False)
    asked = Phase(wishes={3: Wish.SAVE})
    assert (asked.go(), asked.saved) == (6, [3])
    at_the_end = Phase(saved_every=3, wishes={6: Wish.STOP})
    assert (at_the_end.go(), at_the_end.saved, at_the_end.watch.is_stopped) == (6, [3], False)


def test_a_stop_is_a_checkpoint_behind_all_that_belongs_to_its_step() -> None:
    phase = Phase(losses=[3.0, 2.0], evaluated_at=frozenset({4}), wishes={4: Wish.STOP})
    assert (phase.go(), phase.saved, phase.kept, phase.watch.is_stopped) == (4, [4], [4], True)


def test_a_phase_that_stopped_early_saves_nothing_more() -> None:
    """Whoever went on from there would train what patience has ended."""
    phase = Phase(losses=[3, 2, 2.5, 2.6], patience=2, evaluated_at=frozenset({1, 2, 3, 4}), saved_every=3)
    assert (phase.go(), phase.saved) == (3, [])


def test_a_phase_goes_on_after_its_step_and_is_not_evaluated_before_it_again() -> None:
    standing = Standing(step=4, tokens_seen=200)
    phase = Phase(losses=[2.0], evaluated_at=frozenset({6}), standing=standing)
    assert phase.go() == 6
    assert [line["step"] for line in phase.heard.lines] == [5, 6]
    assert phase.heard.lines[-1]["tokens_seen"] == 300
    assert [line["step"] for line in phase.heard.evaluations] == [6]
