"""The matrix, by hand."""

import math

import pytest

from phased_cpt.forgetting import Row, bits_per_byte, judged, measures

#                    one   two   three   wiki
BASE = Row(None, {"one": 4.0, "two": 5.0, "three": 6.0, "wiki": 3.0})
AFTER_ONE = Row("one", {"one": 2.0, "two": 4.5, "three": 6.5, "wiki": 3.1})
AFTER_TWO = Row("two", {"one": 2.25, "two": 3.0, "three": 5.0, "wiki": 2.75})
AFTER_THREE = Row("three", {"one": 3.0, "two": 2.5, "three": 4.0, "wiki": 3.5})
ROWS = [BASE, AFTER_ONE, AFTER_TWO, AFTER_THREE]
PHASES, GENERAL = ["one", "two", "three"], ["wiki"]


@pytest.mark.requirement("E-05")
def test_the_measures_of_three_phases_are_those_worked_out_by_hand() -> None:
    found = measures(PHASES, GENERAL, ROWS)
    assert found["sets"]["one"] == {
        "base": 4.0, "best": 2.0, "best_after": "one", "final": 3.0,
        "backward_transfer": 2.0 - 3.0, "forward_transfer": None, "forgetting": 3.0 - 2.0,
    }  # fmt: skip
    assert found["sets"]["two"] == {
        "base": 5.0, "best": 2.5, "best_after": "three", "final": 2.5,
        "backward_transfer": 3.0 - 2.5, "forward_transfer": 5.0 - 4.5, "forgetting": 0.0,
    }  # fmt: skip
    assert found["sets"]["three"] == {
        "base": 6.0, "best": 4.0, "best_after": "three", "final": 4.0,
        "backward_transfer": None, "forward_transfer": 6.0 - 5.0, "forgetting": 0.0,
    }  # fmt: skip
    assert found["sets"]["wiki"] == {
        "base": 3.0, "best": 2.75, "best_after": "two", "final": 3.5, "drift": 0.5
    }  # fmt: skip
    assert found["mean"] == pytest.approx(
        {
            "final": (3.0 + 2.5 + 4.0) / 3,
            "backward_transfer": (-1.0 + 0.5) / 2,
            "forward_transfer": (0.5 + 1.0) / 2,
            "forgetting": (1.0 + 0.0) / 2,
            "general_drift": 0.5,
        }
    )
    unforgotten = [*ROWS[:-1], Row("three", AFTER_THREE.losses | {"one": 2.0})]
    assert measures(PHASES, GENERAL, unforgotten)["sets"]["one"]["forgetting"] == 0.0, "the control"


def test_a_run_on_its_way_says_what_it_knows() -> None:
    found = measures(PHASES, GENERAL, ROWS[:2])
    assert found["sets"]["one"]["backward_transfer"] is None, "nothing has come after it"
    assert found["sets"]["two"]["forgetting"] is None, "nobody forgets what was not taught"
    assert found["sets"]["two"]["forward_transfer"] == 0.5
    assert found["mean"]["forgetting"] is None
    assert found["mean"]["final"] == pytest.approx((2.0 + 4.5 + 6.5) / 3)


def test_what_was_not_measured_is_none_and_not_zero() -> None:
    """evaluation.matrix: end has the base and the last row alone."""
    found = measures(PHASES, GENERAL, [BASE, AFTER_THREE])
    assert found["sets"]["one"]["final"] == 3.0 and found["sets"]["one"]["best"] == 3.0
    assert found["sets"]["one"]["backward_transfer"] is None and found["sets"]["one"]["forgetting"] is None
    assert found["sets"]["two"]["forward_transfer"] is None
    assert found["sets"]["wiki"]["drift"] == 0.5
    nothing = measures(PHASES, GENERAL, [])
    assert set(nothing["mean"].values()) == {None}


def test_a_gap_in_a_column_is_no_best() -> None:
    rows = [Row(None, {"one": 4.0}), Row("one", {"one": None}), Row("two", {"one": 5.0})]
    found = measures(["one", "two"], [], rows)["sets"]["one"]
    assert (found["best"], found["best_after"], found["backward_transfer"]) == (4.0, None, None)


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    coarse = bits_per_byte(2.0, tokens=100, text_bytes=400)
    fine = bits_per_byte(1.0, tokens=200, text_bytes=400)
    assert coarse == fine == pytest.approx(200 / math.log(2) / 400)
    assert bits_per_byte(2.0, 100, None) is None and bits_per_byte(None, 100, 400) is None


# Gates ----------------------------------------------------------------------------------------------------------------

SO_FAR = {"one": 2.0, "wiki": 3.0}


@pytest.mark.parametrize(
    ("max_forgetting", "min_gain", "losses", "own", "passed"),
    [
        (0.05, None, {"one": 2.04, "wiki": 3.0}, (5.0, 4.0), True),
        (0.05, None, {"one": 2.06, "wiki": 3.0}, (5.0, 4.0), False),
        (0.05, None, {"one": 1.5, "wiki": 3.06}, (5.0, 4.0), False),
        (0.05, None, {"one": None, "wiki": 3.0}, (5.0, 4.0), False),  # no number is no proof
        (None, 0.5, {"one": 9.0, "wiki": 9.0}, (5.0, 4.5), True),
        (None, 0.5, {"one": 2.0, "wiki": 3.0}, (5.0, 4.6), False),
        (None, 0.0, {}, (5.0, None), False),
        (0.05, 0.5, {"one": 2.0, "wiki": 3.0}, (5.0, 4.6), False),
        (0.05, 0.5, {"one": 2.0, "wiki": 3.0}, (5.0, 4.4), True),
    ],
)
def test_a_gate_opens_for_what_it_asks_for(
    max_forgetting: float | None,
    min_gain: float | None,
    losses: dict[str, float | None],
    own: tuple[float | None, float | None],
    passed: bool,
) -> None:
    assert judged(max_forgetting, min_gain, SO_FAR, losses, own).passed is passed


def test_a_verdict_names_what_was_forgotten_most() -> None:
    verdict = judged(0.05, 0.1, SO_FAR, {"one": 2.5, "wiki": 3.2, "two": 1.0}, (5.0, 4.0))
    assert (verdict.worst, verdict.forgetting, verdict.gain) == ("one", 0.5, 1.0)
    assert str(verdict) == (
        "one stands +0.5000 above its best (at most 0.05); its own held-out loss fell by +1.0000 (at least 0.1)"
    )
