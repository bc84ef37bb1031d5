"""How long a phase is, and how its learning rate goes."""

import math
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phased_cpt.config import Training
from phased_cpt.errors import InputError
from phased_cpt.schedule import Batch, Budget, Cooling, Prepared, Schedule, batch_of, share_of

SHAPES = get_args(Training.model_fields["lr_scheduler"].annotation)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(st.integers(1, 500))
    shape, warmup = draw(st.sampled_from(SHAPES)), draw(st.integers(0, steps - 1))
    decay = draw(st.integers(shape != "infinite", steps - warmup))
    constant = draw(st.floats(1e-3, 1))
    return Schedule(
        shape=shape,
        peak=draw(st.floats(1e-7, 1)),
        steps=steps,
        warmup_steps=warmup,
        decay_steps=decay,
        min_ratio=draw(st.floats(0, constant if shape == "infinite" else 1)),
        cooldown_steps=draw(st.integers(0, steps - warmup - decay)),
        constant_ratio=constant,
    )


@given(schedules())
def test_the_rate_rises_through_the_warmup_and_never_again(schedule: Schedule) -> None:
    rates = [schedule.rate(done) for done in range(schedule.steps + 50)]
    warmup, rest = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    assert all(early < late for early, late in pairwise([*warmup, schedule.peak]))
    assert all(early >= late * (1 - 1e-12) for early, late in pairwise(rest))


@given(schedules())
def test_every_step_learns_and_past_the_end_the_floor_holds(schedule: Schedule) -> None:
    floor = schedule.peak if schedule.shape == "constant" else schedule.floor
    assert all(0 < schedule.rate(done) <= schedule.peak for done in range(schedule.steps))
    for done in (schedule.steps, schedule.steps + 1, schedule.steps * 10):
        assert schedule.rate(done) == pytest.approx(floor, abs=1e-15)


@pytest.mark.requirement("T-02")
def test_infinite_goes_down_to_its_rate_stays_there_and_ends_once() -> None:
    """Three phases of eight steps in a row, as one: the second neither warms up nor goes down, the third only ends."""
    how = {"shape": "infinite", "peak": 1.0, "steps": 8, "constant_ratio": 0.4, "min_ratio": 0.1}
    first = Schedule(**how, warmup_steps=2, cooldown_steps=3)  # type: ignore[arg-type]
    second, third = Schedule(**how), Schedule(**how, decay_steps=4)  # type: ignore[arg-type]
    assert [round(first.rate(done), 3) for done in range(10)] == [0.333, 0.667, 1, 0.85, 0.55, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert [second.rate(done) for done in range(10)] == pytest.approx([0.4] * 10, rel=1e-12)
    assert [round(third.rate(done), 3) for done in range(10)] == [0.4, 0.4, 0.4, 0.4, 0.4, 0.25, 0.188, 0.14, 0.1, 0.1]
    cosine = Schedule("cosine", 1.0, 8, warmup_steps=2)
    assert cosine.rate(0) < cosine.rate(2) > cosine.rate(7), "the control: a next phase of this would warm up again"


@given(schedules(), st.data())
def test_a_phase_that_stops_early_goes_from_the_rate_it_has_to_its_floor(
    schedule: Schedule, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(1, schedule.steps))
    cooling = schedule.cooling(begin, 0.1, schedule.steps - begin)
    if cooling is None:
        low = schedule.floor + 0.1 * (schedule.peak - schedule.floor)
        assert begin == schedule.steps or schedule.rate(begin) <= low * (1 + 1e-12), "there was nothing to go down from"
        return
    rates = [schedule.rate(done, cooling) for done in range(schedule.steps + 20)]
    assert rates[: begin + 1] == [schedule.rate(done) for done in range(begin + 1)], "nothing behind it is another"
    assert all(early >= late for early, late in pairwise(rates[begin:]))
    assert rates[cooling.end :] == [pytest.approx(schedule.floor, abs=1e-15)] * len(rates[cooling.end :])
    assert cooling.end <= schedule.steps and (cooling.steps >= 10 or cooling.end == schedule.steps)


def test_a_cool_down_is_a_share_of_the_steps_done_and_ten_at_least() -> None:
    schedule = Schedule("constant", 1.0, 1000, min_ratio=0.2)
    assert schedule.cooling(400, 0.1, 600) == Cooling(400, 40)
    assert schedule.cooling(30, 0.1, 970) == Cooling(30, 10)
    assert schedule.cooling(998, 0.1, 2) == Cooling(998, 2), "it never outlasts the phase"
    assert schedule.cooling(400, 0.0, 600) is None, "the old way: at once"
    cooling = Cooling(400, 4)
    assert [round(schedule.rate(done, cooling), 3) for done in (399, 400, 401, 402, 403, 404)] == [
        1, 1, 0.6, 0.434, 0.307, 0.2,
    ]  # fmt: skip
    before_another = Schedule("infinite", 1.0, 1000, constant_ratio=0.5)
    assert before_another.cooling(400, 0.1, 600) is None, "the next phase goes on at this rate"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_that_can_be_written_can_be_computed(shape: str) -> None:
    assert Schedule(shape, 1.0, 8, decay_steps=4).rate(0) == 1.0


def test_the_shapes_are_these() -> None:
    def rates(shape: str, **options: float) -> list[float]:
        schedule = Schedule(shape, peak=1.0, steps=8, warmup_steps=2, decay_steps=4, **options)  # type: ignore[arg-type]
        return [round(schedule.rate(done), 3) for done in range(9)]

    assert rates("constant") == [0.333, 0.667, 1, 1, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.333, 0.667, 1, 0.833, 0.667, 0.5, 0.333, 0.167, 0]
    assert rates("linear", min_ratio=0.4) == [0.333, 0.667, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert rates("cosine") == [0.333, 0.667, 1, 0.933, 0.75, 0.5, 0.25, 0.067, 0]
    assert rates("wsd") == [0.333, 0.667, 1, 1, 1, 0.5, 0.293, 0.134, 0]


def test_a_cosine_that_went_on_would_rise_again() -> None:
    """The negative control: this is what a schedule without a floor past its end does."""
    plain = [0.5 * (1 + math.cos(math.pi * done / 8)) for done in (8, 12, 16)]
    assert plain == pytest.approx([0, 0.5, 1])
    assert [Schedule("cosine", 1.0, 8).rate(done) for done in (8, 12, 16)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("budget", "blocks", "tokens", "rows", "steps"),
    [
        (Budget("steps", 70), 5, 100, 4, 70),
        (Budget("epochs", 3), 5, 100, 4, 4),  # 15 rows: 4 + 4 + 4 + 3
        (Budget("epochs", 1), 8, 100, 4, 2),
        (Budget("epochs", 0.5), 9, 100, 1, 5),
        (Budget("epochs", 0.1), 30, 100, 1, 3),  # not 4, for all that 0.1 × 30 is 3.0000000000000004
        (Budget("epochs", 0.001), 9, 100, 4, 1),
        (Budget("epochs", 1.0), 10**16 + 1, 1, 1, 10**16 + 1),
        (Budget("tokens", 1000), 10, 2000, 1, 5),
        (Budget("tokens", 1001), 10, 2000, 1, 6),
        (Budget("tokens", 10**15), 3 * 10**6, 10**11, 1000, 3 * 10**7),
    ],
)
def test_steps_of_a_budget(budget: Budget, blocks: int, tokens: int, rows: int, steps: int) -> None:
    assert budget.steps(rows, Prepared(blocks, tokens)) == steps


def test_steps_are_not_known_before_the_data_is() -> None:
    assert Budget("epochs", 1).steps(4, None) is None
    assert Budget("tokens", 1).steps(None, Prepared(1, 1)) is None
    assert Budget("steps", 3).steps(None, None) == 3


@given(
    epochs=st.floats(0.01, 20),
    blocks=st.integers(1, 10_000),
    rows=st.integers(1, 512),
)
def test_the_steps_hold_every_row_and_hardly_more(epochs: float, blocks: int, rows: int) -> None:
    steps = Budget("epochs", epochs).steps(rows, Prepared(blocks, 1))
    assert steps is not None
    assert epochs * blocks - 1e-6 <= steps * rows < epochs * blocks + rows + 1


@given(micro=st.integers(1, 16), accumulation=st.integers(1, 32), ranks=st.integers(1, 64))
def test_a_batch_is_its_parts_multiplied(micro: int, accumulation: int, ranks: int) -> None:
    batch = batch_of(ranks, micro, accumulation)
    assert batch.rows == micro * accumulation * ranks
    assert batch_of(ranks, micro, accumulation=99, global_rows=batch.rows) == batch


def test_a_global_batch_is_the_same_on_any_number_of_ranks_that_divides_it() -> None:
    assert [batch_of(ranks, 2, 6, 48) for ranks in (1, 4, 8)] == [
        Batch(48, 2, 24, 1),
        Batch(48, 2, 6, 4),
        Batch(48, 2, 3, 8),
    ]
    with pytest.raises(
        InputError, match="48 rows cannot be shared by 5 ranks × micro_batch_size 2; take a multiple of 10"
    ):
        batch_of(5, 2, 6, 48)


@given(steps=st.integers(1, 10**6), percent=st.integers(0, 100))
def test_a_share_is_rounded_up_but_not_by_a_rounding_error(steps: int, percent: int) -> None:
    assert share_of(steps, percent / 100) == -(-steps * percent // 100)
