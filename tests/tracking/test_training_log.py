"""The story of a run as text."""

import logging
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from phased_cpt.tracking import training_log
from phased_cpt.tracking.training_log import TrainingLog
from tests.tracking.shapes import evaluation, step, stretch


def test_steps_evaluations_and_messages_of_all_phases_follow_each_other_with_their_time(tmp_path: Path) -> None:
    logging.disable(logging.CRITICAL)  # what another library asks of its loggers
    try:
        for number, begin in ((1, 0), (2, 8)):
            log = TrainingLog(stretch(tmp_path, begin=begin, attempt=number))
            log.train(step(begin + 1))
            log.evaluated(evaluation(begin + 1))
            log.tell("a checkpoint was broken")
            log.close()
    finally:
        logging.disable(logging.NOTSET)
    lines = (tmp_path / "logs" / "training.log").read_text().splitlines()
    assert all(re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ phase 2/3|.*Z a checkpoint", line) for line in lines)
    assert [line.split("Z ", 1)[1].removeprefix("phase 2/3 evolution: ")[:24] for line in lines] == [
        "attempt 1 starts",
        "step 1/40, loss 3.214, l",
        "step 1, held-out loss 3.",
        "a checkpoint was broken",
        "attempt 2 goes on after ",
        "step 9/40, loss 3.214, l",
        "step 9, held-out loss 3.",
        "a checkpoint was broken",
    ]


def test_its_time_is_utc_wherever_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    try:
        TrainingLog(stretch(tmp_path)).close()
        here = datetime.now().replace(tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()
    told = datetime.fromisoformat((tmp_path / "logs" / "training.log").read_text().split(" ")[0])
    assert abs(datetime.now(UTC) - told) < timedelta(hours=1)
    assert abs(here - told) > timedelta(hours=10), "the clock on the wall says something else"


def test_it_is_rotated_before_it_grows_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_log, "MAX_BYTES", 1000)
    log = TrainingLog(stretch(tmp_path))
    for number in range(1, 100):
        log.train(step(number))
    log.close()
    files = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert files == ["training.log", *(f"training.log.{number}" for number in range(1, 6))]
    assert all(path.stat().st_size <= 1000 for path in (tmp_path / "logs").iterdir())
    assert "step 99/40" in (tmp_path / "logs" / "training.log").read_text()


def test_a_line_that_cannot_be_written_raises(tmp_path: Path) -> None:
    log = TrainingLog(stretch(tmp_path))
    log.tell("it can")
    log._file.stream.close()
    log._file.stream = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        log.tell("it cannot")
