"""What TensorBoard reads from the event files."""

import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from phased_cpt.tracking import Stretch
from phased_cpt.tracking.tensorboard import Tensorboard, open_tensorboard
from tests.tracking.shapes import child, evaluation, killed, step, stretch, until

FOREVER = """
from time import sleep
from phased_cpt.tracking.tensorboard import Tensorboard
sink = Tensorboard(stretch(Path(sys.argv[1])))
sink.evaluated(evaluation(0))
for number in range(1, 41):
    sink.train(step(number))
print("written", flush=True)
sleep(600)
"""


def drawn(root: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(root / "tensorboard")).Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def tags(root: Path) -> set[str]:
    return set(EventAccumulator(str(root / "tensorboard")).Reload().Tags()["scalars"])


def attempt(phase: Stretch, end: int) -> None:
    """Steps whose loss is the number of the attempt, and an evaluation before and after them."""
    sink = Tensorboard(phase)
    if not phase.begin:
        sink.evaluated(evaluation(0, dataset=phase.phase, eval_loss=phase.attempt))
    for number in range(phase.begin + 1, end + 1):
        sink.train(step(number, loss=phase.attempt))
    sink.evaluated(evaluation(end, dataset=phase.phase, eval_loss=phase.attempt))
    sink.close()


def test_steps_and_evaluations_stand_on_the_axis_of_the_curriculum(tmp_path: Path) -> None:
    sink = Tensorboard(stretch(tmp_path, steps_before=100))
    sink.train(step(7, mfu=0.41))
    sink.evaluated(evaluation(7))
    sink.close()
    assert drawn(tmp_path, "train/loss") == [(107, 3.2141)]
    assert drawn(tmp_path, "eval/evolution/perplexity") == [(107, 30.3256)]
    train = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second", "train/mfu"}
    assert tags(tmp_path) == train | {"eval/evolution/loss", "eval/evolution/perplexity"}


def test_what_is_not_finite_is_not_drawn(tmp_path: Path) -> None:
    sink = Tensorboard(stretch(tmp_path))
    sink.train(step(1, loss=math.nan, grad_norm=math.inf, learning_rate=None))
    sink.evaluated(evaluation(1, perplexity=None))
    sink.close()
    assert tags(tmp_path) == {"train/tokens_per_second", "eval/evolution/loss"}


def test_steps_that_are_done_again_replace_what_was_drawn(tmp_path: Path) -> None:
    attempt(stretch(tmp_path), 5)
    attempt(stretch(tmp_path, begin=3, attempt=2), 4)
    assert drawn(tmp_path, "train/loss") == [(101, 1), (102, 1), (103, 1), (104, 2)]
    assert drawn(tmp_path, "eval/evolution/loss") == [(100, 1), (104, 2)]


def test_a_new_phase_takes_nothing_from_the_one_before_which_ended_at_its_step_0(tmp_path: Path) -> None:
    attempt(stretch(tmp_path, number=1, phase="foundation", steps=3, steps_before=0), 3)
    attempt(stretch(tmp_path, steps_before=3, attempt=1), 2)
    attempt(stretch(tmp_path, steps_before=3, attempt=2), 1)
    assert drawn(tmp_path, "train/loss") == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert drawn(tmp_path, "eval/foundation/loss") == [(0, 1), (3, 1)]


def test_a_curriculum_that_starts_afresh_shows_nothing_of_the_start_before(tmp_path: Path) -> None:
    attempt(stretch(tmp_path, steps_before=0), 3)
    attempt(stretch(tmp_path, steps_before=0, attempt=2), 1)
    assert drawn(tmp_path, "train/loss") == [(1, 2)]
    assert drawn(tmp_path, "eval/evolution/loss") == [(0, 2), (1, 2)]


def test_a_killed_process_has_left_what_it_wrote_some_seconds_ago(tmp_path: Path) -> None:
    with child(FOREVER, tmp_path, stdout=-1) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        assert until(lambda: "train/loss" in tags(tmp_path) and len(drawn(tmp_path, "train/loss")) == 40)
        killed(process)
    assert drawn(tmp_path, "train/loss")[-1] == (140, 3.2141)
    assert drawn(tmp_path, "eval/evolution/loss") == [(100, 3.412)]


def test_it_is_there_only_where_it_is_wanted(tmp_path: Path) -> None:
    assert open_tensorboard(stretch(tmp_path, tensorboard=False)) is None
    assert not (tmp_path / "tensorboard").exists()
    sink = open_tensorboard(stretch(tmp_path, tensorboard=True))
    assert sink is not None
    sink.close()
