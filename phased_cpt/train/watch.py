"""What happens around the steps of a phase: checks, evaluations, the best weights, checkpoints, a line for the sinks.

begin  masters to the bit ─ loss and isolation looked at ─ evaluated before step 0, or gone on with after a later one
step   a line ─ every weight reached and moved? ─ evaluated where it is due ─ best kept ─ patience ─ checkpoint ─ stop?
                                                                                       out of it: cools down, then stops
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from transformers import TrainerCallback

from phased_cpt.errors import Diverged
from phased_cpt.evals.heldout import Measured
from phased_cpt.schedule import Schedule
from phased_cpt.stopping import Wish
from phased_cpt.train.standing import Best, Standing

SMOOTHED_STEPS = 20  # over which the speed is told
MOST_SKIPPED = 50  # in a row; DeepSpeed halves the scale at each, and starts at 2^16


class Listener(Protocol):
    """Whoever writes what is told: rank 0 has sinks, the others nobody."""

    def train(self, line: dict[str, Any]) -> None: ...

    def evaluated(self, line: dict[str, Any]) -> None: ...

    def tell(self, message: str) -> object: ...


class Nobody:
    """No rank but the first writes."""

    def train(self, line: dict[str, Any]) -> None:
        pass

    def evaluated(self, line: dict[str, Any]) -> None:
        pass

    def tell(self, message: str) -> None:
        pass


@dataclass(frozen=True)
class Course:
    """How a phase goes, in plain numbers."""

    phase: str
    steps: int
    evaluated_at: frozenset[int]  # besides step 0
    main_set: str | None  # whose loss decides; None without held-out documents
    best_of: dict[str, float]  # several sets instead, weighted; empty for the main one alone
    patience: int | None
    rows_per_step: int
    blocks: int
    later_steps: float  # of the phases to come, each weighed by its positions against this one's
    saved_every: int
    schedule: Schedule
    cooldown_ratio: float  # steps, of those done, in which the rate falls once patience is out; 0 stops at once


@dataclass
class Watch(TrainerCallback):
    """One phase, watched. The functions are collective: every rank calls them at the same steps."""

    course: Course
    standing: Standing  # where the phase stands, of this attempt and those before
    listener: Listener
    at_begin: Callable[[], None]  # once the engine is there
    ready: Callable[[], None]  # before the first step of this attempt
    evaluate: Callable[[], dict[str, Measured]]
    check: Callable[[int], None]  # after a step: weights reached and moved
    keep_best: Callable[[], None]
    tokens_of_step: Callable[[], int]
    utilisation: Callable[[float], dict[str, float]]  # from tokens a second
    skipped: Callable[[], bool]  # whether fp16 has overflowed, and the step was not taken
    wished: Callable[[int], Wish]  # after a step: what is asked for
    save: Callable[[], None]
    is_stopped: bool = False
    _step_began: float = 0.0
    _recent: list[tuple[float, int]] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        state.global_step = self.standing.step
        self.at_begin()
        if self.standing.step == 0:
            self._before_step_0()
        self.ready()

    def _before_step_0(self) -> None:
        if self.course.main_set is None:
            self.listener.tell(
                f"{self.course.phase}: no held-out documents, so it is not measured; its last weights are published"
            )
        started = time.monotonic()
        self._evaluate(0)
        seconds = time.monotonic() - started
        if self.standing.measured[0]:
            self.listener.tell(f"{self.course.phase}: evaluated before step 0 in {seconds:.1f} s")

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        taken = time.monotonic() - self._step_began, self.tokens_of_step()
        self.standing.tokens_seen += taken[1]
        self._recent = [*self._recent[1 - SMOOTHED_STEPS :], taken]

    def _require_sound(self, step: int, gradient: float | None) -> None:
        """The step that was taken was one; DeepSpeed writes the norm of a gradient that is no number as -1."""
        if self.skipped():
            self._count_skipped(step)
            return
        if gradient is not None and not 0 <= gradient < float("inf"):
            raise Diverged(step, (), "the gradient")
        self.standing.skipped_in_a_row = 0
        self.check(step - self.standing.skipped_steps)

    def _count_skipped(self, step: int) -> None:
        """fp16 finds its scale by overflowing; that it never finds one is another thing."""
        standing = self.standing
        standing.skipped_steps, standing.skipped_in_a_row = standing.skipped_steps + 1, standing.skipped_in_a_row + 1
        self.listener.tell(
            f"{self.course.phase}: step {step} was skipped (fp16 overflow, {standing.skipped_steps} so far)"
        )
        if standing.skipped_in_a_row >= MOST_SKIPPED:
            raise Diverged(step, (), f"in the last {MOST_SKIPPED} steps the gradient")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        """The Trainer has the loss of a step now; what is due at it comes behind its line."""
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        self.listener.train(self._line(step, logs))
        self._require_sound(step, logs.get("grad_norm"))
        cooled = self.standing.cooling is not None and step >= self._last
        if (step in self.course.evaluated_at or cooled) and (self.course.main_set or self.course.best_of):
            self._evaluate(step)
            self._judge(step)
        if cooled:
            self.standing.stopped_early = True
            self.listener.tell(f"{self.course.phase}: stopped at step {step}, its learning rate cooled down")
        self.standing.step = step
        self._save_or_stop(step)
        control.should_training_stop |= self.standing.stopped_early or self.is_stopped

    def _save_or_stop(self, step: int) -> None:
        """Behind all else that belongs to a step: whoever goes on from it does none of that again."""
        if self.standing.stopped_early or step >= self.course.steps:
            return  # it is published in a moment
        wish = self.wished(step)
        if wish != Wish.NOTHING or step % self.course.saved_every == 0:
            self.save()
        self.is_stopped = wish == Wish.STOP

    def _line(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        seconds = sum(each for each, _ in self._recent)
        a_step, speed = seconds / len(self._recent), sum(tokens for _, tokens in self._recent) / seconds
        left = self._last - step
        return {
            "ts": _now(),
            "phase": self.course.phase,
            "step": step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs["learning_rate"],
            "epoch": round(step * self.course.rows_per_step / self.course.blocks, 4),
            "progress_pct": round(100 * step / self._last, 2),
            "eta_seconds": round(left * a_step, 1),
            "curriculum_eta_seconds": round((left + self.course.later_steps) * a_step, 1),
            "tokens_seen": self.standing.tokens_seen,
            "tokens_per_second": round(speed, 1),
            **self.utilisation(speed),
        }

    def _evaluate(self, step: int) -> None:
        self.standing.measured[step] = self.evaluate()
        for name, found in self.standing.measured[step].items():
            self.listener.evaluated({"ts": _now(), "phase": self.course.phase, "step": step} | told(name, found))

    def _judge(self, step: int) -> None:
        """Whether these are the best weights so far, and whether there is any hope left."""
        loss, best = self._loss_at(step), self.standing.best
        if math.isfinite(loss) and (best is None or loss < best.loss):
            self.standing.best = Best(step, loss)
            self.keep_best()
            return
        if best is None:
            return
        best.worse_since += 1
        out_of_patience = self.course.patience is not None and best.worse_since >= self.course.patience
        if out_of_patience and self.standing.cooling is None and step < self.course.steps:
            since = f"{best.worse_since} evaluations without a loss below {best.loss:.4f} (step {best.step})"
            self._give_up(step, since)

    def _give_up(self, step: int, since: str) -> None:
        """At once where the rate is low; weights that are cut off at a high one have not settled."""
        schedule, done = self.course.schedule, step - self.standing.skipped_steps
        self.standing.cooling = schedule.cooling(done, self.course.cooldown_ratio, self.course.steps - step)
        self.standing.stopped_early = self.standing.cooling is None
        if self.standing.stopped_early:
            self.listener.tell(f"{self.course.phase}: stopped at step {step}: {since}")
        else:
            falls = f"the learning rate falls from {schedule.rate(done):.2g} to {schedule.floor:.2g}"
            self.listener.tell(f"{self.course.phase}: {since}; {falls}, and it stops at step {self._last}")

    @property
    def _last(self) -> int:
        """The step that the phase ends with, as far as is known; steps that overflow do not cool it down."""
        cooling, steps = self.standing.cooling, self.course.steps
        return steps if cooling is None else min(steps, cooling.end + self.standing.skipped_steps)

    def _loss_at(self, step: int) -> float:
        """What decides: the loss of the phase's own set, or the weighted mean of those that the user has named."""
        measured, weights = self.standing.measured[step], self.course.best_of or {self.course.main_set or "": 1.0}
        return sum(measured[name].loss * weight for name, weight in weights.items()) / sum(weights.values())


def told(name: str, found: Measured) -> dict[str, Any]:
    """A measurement in the words of eval.jsonl."""
    return {"dataset": name, "eval_loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
