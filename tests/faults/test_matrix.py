"""The matrix tells what the run has shown: what failed, what was skipped, and what has no test."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.faults.elsewhere import ELSEWHERE
from tests.faults.matrix import FAULTS, Matrix


def report(fault: str, outcome: str, words: str = "", seconds: float = 2.0) -> pytest.TestReport:
    told = [("told", (words, 12))] if words else []
    skipped = ("x.py", 1, "Skipped: no mount here") if outcome == "skipped" else None
    return pytest.TestReport(
        f"x.py::{outcome}", ("x.py", 1, "x"), {}, outcome, skipped, "call", duration=seconds,  # type: ignore[arg-type]
        user_properties=[("fault", (fault, "by hand", "exact (E)")), *told],
    )  # fmt: skip


def test_every_row_says_what_came_of_it(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path / "matrix.md", "of today")
    for each in (report("F3", "passed", "12 points"), report("F3", "passed"), report("F4", "failed"), report("F14", "skipped")):  # fmt: skip
        matrix.pytest_runtest_logreport(each)
    matrix.pytest_sessionfinish(1)
    page = matrix.path.read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| F")}
    assert list(rows) == list(FAULTS)
    assert "| by hand | 13 | exact (E) | 4 |" in rows["F3"]
    assert "**failed: 1 of 1 tests** (x.py::failed)" in rows["F4"] and "exact" not in rows["F4"]
    assert "**skipped: no mount here**" in rows["F14"]
    assert "**no test in this run**" in rows["F1"]
    assert "- F3 `x.py::passed`: 12 points" in page
    matrix.path.unlink()
    matrix.pytest_sessionfinish(2)
    assert not matrix.path.exists(), "of a run that was broken off"


def test_the_proofs_that_stand_elsewhere_are_there() -> None:
    for nodeid, proofs in ELSEWHERE.items():
        path, *_, name = nodeid.split("::")
        assert re.search(rf"def {name}\(", (REPOSITORY / path).read_text()), nodeid
        assert all(fault in FAULTS for fault, _, _ in proofs)
