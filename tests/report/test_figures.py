"""What is drawn: thinned logs, round ticks, the shades of the matrix, the time that was worked."""

import itertools
import json
import math
from pathlib import Path

import pytest

from phased_cpt.report.curves import curves, smoothed, thinned, ticks
from phased_cpt.report.folder import read_folder
from phased_cpt.report.forgotten import shade
from phased_cpt.report.logs import LAST_BYTES, WINDOW_BYTES, WINDOWS, last_line, lines_of, number
from phased_cpt.report.samples import pieces
from phased_cpt.report.timeline import timeline, worked
from phased_cpt.report.written import DASH, change, lasted, loss, perplexity, rate, share
from tests.report.folders import evaluation, folder, phase, record, step

# Logs -----------------------------------------------------------------------------------------------------------------


def test_of_a_small_log_every_line_is_read_and_what_is_torn_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    log.write_bytes(b'{"step": 2}\n\nnull\n{"step": "x"}\n{"step": NaN}\n\xff\n{"step": 1}\n{"step": 3, "lo')
    assert lines_of(log) == [{"step": 1}, {"step": 2}]
    assert lines_of(tmp_path / "none") == []


def test_of_a_log_of_a_million_lines_a_few_thousand_are_read_all_over_it(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    log.write_text(
        "".join(f'{{"step": {at}, "loss": {at / 1e6:.6f}, "filling": "{"x" * 40}"}}\n' for at in range(1_000_001))
    )
    assert log.stat().st_size > 20 * WINDOWS * WINDOW_BYTES
    steps = [line["step"] for line in lines_of(log)]
    assert (steps[0], steps[-1]) == (0, 1_000_000)
    assert WINDOWS * 10 < len(steps) < WINDOWS * WINDOW_BYTES / 60
    assert max(after - before for before, after in itertools.pairwise(steps)) < 3 * 1_000_000 / WINDOWS
    assert last_line(log) == json.loads(log.read_text().splitlines()[-1])


def test_the_last_line_of_a_log_that_is_being_written_is_the_last_whole_one(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    log.write_text("x" * 2 * LAST_BYTES + '\n{"step": 1}\n{"step": 2}\n{"step": 3, "l')
    assert last_line(log) == {"step": 2}
    log.write_text("")
    assert last_line(log) is None


@pytest.mark.parametrize("value", [None, True, "3", math.nan, math.inf, -math.inf, 10**400, [], {}])
def test_what_is_no_number_is_not_drawn(value: object) -> None:
    assert number(value) is None
    assert loss(value) == change(value) == perplexity(value) == share(value) == rate(value) == lasted(value) == DASH


def test_numbers_are_written_as_people_read_them() -> None:
    assert [loss(2.0), change(0.1), change(-0.25), change(-0.0001)] == ["2.000", "+0.100", "−0.250", "±0.000"]
    assert [perplexity(18.25), perplexity(4229.8), perplexity(1e9)] == ["18.2", "4,230", "1e+09"]
    assert [lasted(0), lasted(9.94), lasted(75), lasted(3600), lasted(93_784)] == [
        "0.0 s",
        "9.9 s",
        "1 min 15 s",
        "1 h",
        "1 d 2 h",
    ]
    assert [rate(1e-4), rate(3.456789e-05)] == ["1e-4", "3.46e-5"]


# Curves ---------------------------------------------------------------------------------------------------------------


def test_many_points_become_few_that_keep_the_spikes() -> None:
    points = [(float(at), 100.0 if at == 5000 else 1.0) for at in range(10_000)]
    found = thinned(points)
    assert len(found) <= 240
    assert max(high for _, _, _, high in found) == 100.0
    assert thinned(points[:3]) == [(0.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0), (2.0, 1.0, 1.0, 1.0)]


def test_a_smoothed_line_keeps_its_ends_and_a_straight_line_as_it_is() -> None:
    straight = [(float(at), 2.0 * at) for at in range(100)]
    assert smoothed(straight) == straight
    noisy = [(float(at), float(at % 2)) for at in range(100)]
    assert max(value for _, value in smoothed(noisy)[10:90]) < 0.7


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(3.9, 8.4, [4, 5, 6, 7, 8]), (2.81, 2.97, [2.85, 2.9, 2.95]), (1.0, 1.0, [1.0])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_all_phases_are_drawn_on_one_scale_and_a_spike_runs_out_of_the_picture(tmp_path: Path) -> None:
    spiky = [step(at, 1e6 if at == 500 else 3.0 + 1 / at, 241) for at in range(1, 1001)]
    run = folder(
        tmp_path,
        {
            "run.json": record(phase(1, "foundation"), phase(2, "evolution")),
            "phase1_foundation/logs/train.jsonl": spiky,
            "phase2_evolution/logs/train.jsonl": [step(1, None, 242), step(2, 2.5, 243)],
            "phase2_evolution/logs/eval.jsonl": [evaluation(0, 3.9, "evolution"), evaluation(0, 2.0, "foundation")],
        },
    )
    first, second = curves(read_folder(run))["panels"]
    assert first["ticks"] == second["ticks"]
    assert max(float(tick["loss"]) for tick in first["ticks"]) < 5
    assert len(first["held_out"].split()) == 0
    assert len(second["held_out"].split()) == 1
    assert len(second["others"]) == 1
    assert "from 4.000 to 3.001 in 1,000 steps" in first["spoken"]


# The matrix -----------------------------------------------------------------------------------------------------------


def test_colours_go_from_the_base_to_the_best_and_beyond_the_base() -> None:
    column = [4.0, 3.0, 3.25, 4.5, 9.0]
    assert [shade(value, column) for value in column] == ["", "b8", "b4", "w4", "w8"]


def test_near_the_best_a_little_is_seen() -> None:
    column = [8.4, 5.394, 5.523]  # from random weights; an eighth of a nat forgotten
    assert [shade(value, column) for value in column] == ["", "b8", "b6"]


def test_a_column_that_has_hardly_moved_stays_pale() -> None:
    assert [shade(value, [3.000, 2.999, 3.001]) for value in (3.000, 2.999, 3.001)] == ["", "", ""]
    assert shade(3.0, [3.0]) == ""


# Samples --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (" b):\n    return", [(" b):\n    return", "")]),
        ("a\n+\n+\n+\n+\n+\nb", [("a\n+", "the same line, 4 times more"), ("b", "")]),
        ("a\n\n\n\n\n", [("a", "5 empty lines")]),
        ("\n" * 9, [("", "10 empty lines")]),
        ("a\n\n\nb", [("a\n\n\nb", "")]),
        ("", [("", "nothing")]),
        (" ", [(" ", "nothing")]),
    ],
)
def test_a_line_that_is_said_for_ever_is_told_once(said: str, expected: list[tuple[str, str]]) -> None:
    assert list(pieces(said)) == expected


# The timeline ---------------------------------------------------------------------------------------------------------

HOURS = "2026-01-02T{}+00:00"


def test_a_stop_is_a_break_of_one_width_and_bars_are_as_wide_as_the_work(tmp_path: Path) -> None:
    attempts = [
        {"started": HOURS.format(begun), "host": "h", "pid": 1, "version": "1"} for begun in ("03:00:00", "13:00:00")
    ]
    lines = [step(1, 3.0, 0) | {"ts": HOURS.format(at)} for at in ("03:30:00", "04:00:00", "13:30:00", "14:00:00")]
    first = phase(1, "foundation", started=HOURS.format("03:00:00"), finished=HOURS.format("14:00:00"))
    second = phase(2, "evolution", started=HOURS.format("14:00:00"), finished=HOURS.format("15:00:00"))
    run = folder(
        tmp_path,
        {
            "run.json": record(first, second, attempts=attempts),
            "phase1_foundation/logs/train.jsonl": [line | {"step": at} for at, line in enumerate(lines, 1)],
        },
    )
    found = read_folder(run)
    assert [each.end - each.begin for each in worked(found, 0.0)] == [3600.0, 7200.0]
    drawn = timeline(found)
    widths = [(bar["number"], bar["width"]) for bar in drawn["bars"]]
    assert widths == [(1, 32.8), (1, 32.8), (2, 32.8)]
    assert drawn["breaks"] == [{"x": pytest.approx(32.8), "width": 1.6}]
    assert "stopped 1 time, 9 h in all" in drawn["phases"][0]["facts"]
    assert "1 h" in drawn["phases"][0]["facts"]  # between its signs of life, the stop left out


def test_what_is_to_come_is_drawn_as_long_as_the_last_step_says(tmp_path: Path) -> None:
    running = [step(1, 3.0, 240 + 60, eta_seconds=60.0, curriculum_eta_seconds=120.0)]
    run = folder(
        tmp_path,
        {
            "run.json": record(phase(1, "foundation", "running"), phase(2, "evolution", "pending", started=None)),
            "phase1_foundation/logs/train.jsonl": running,
        },
    )
    bars = [(bar["number"], bar["state"], bar["width"]) for bar in timeline(read_folder(run))["bars"]]
    (_, _, begun), (_, state, left), (number, _, following) = bars
    assert (state, number) == ("pending", 2)
    assert left == following == pytest.approx(begun, rel=0.2)
