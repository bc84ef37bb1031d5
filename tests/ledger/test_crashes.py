"""A crash at any file operation leaves the old state or the new one, and the same call goes on from there.

A child process runs one step of a run's life and is killed (SIGKILL) or fails (an OSError) at its n-th file operation,
for every n until the step goes through undisturbed. The parent then looks at what is on disk.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phased_cpt.config import Loaded
from phased_cpt.ledger import Ledger, RunRecord, read_record
from phased_cpt.plan import Plan, make_plan
from phased_cpt.run_dir import RunDir
from tests.ledger.test_book import RUN, begin_all, states

OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "close")
Step = Callable[[RunDir], object]


def killed(step: Step, run_dir: RunDir, at: int, action: str) -> bool:
    """Run a step in a child that is stopped before its n-th file operation; False if it has no n-th."""
    child = os.fork()
    if child == 0:
        exit_code = 9
        try:
            left = _stop_before(at, action)
            step(run_dir)
            exit_code = 0 if left[0] > 0 else 8  # a failure may be one that the step can live with
        finally:
            os._exit(exit_code)  # whatever happens, the child must not go on as a second pytest
    return os.waitpid(child, 0)[1] != 0


def _stop_before(at: int, action: str) -> list[int]:
    left = [at]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if action == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    return left


@pytest.fixture(params=["kill", "fail"])
def crashes(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Step, Step], Iterator[RunDir]]:
    """For every n: a folder in which `prepare` went well and `step` was stopped at its n-th operation."""

    def each(prepare: Step, step: Step) -> Iterator[RunDir]:
        for at in range(1, 500):
            run_dir = RunDir(tmp_path / f"{at}")
            prepare(run_dir)
            if not killed(step, run_dir, at, request.param):
                assert at > 5, "the step did something that could be stopped"
                return
            yield run_dir
        raise AssertionError("the step never ended")

    return each


@pytest.fixture
def plan(loaded: Callable[..., Loaded]) -> Callable[..., Plan]:
    return lambda *overrides, text=RUN: make_plan(loaded(text, *overrides))


Crashes = Callable[[Step, Step], Iterator[RunDir]]


def no_record(_: RunDir) -> None: ...


def test_beginning_a_run(crashes: Crashes, plan: Callable[..., Plan]) -> None:
    planned = plan()
    seen = set()
    for run_dir in crashes(no_record, lambda run_dir: Ledger.open(run_dir, planned)):
        record = read_record(run_dir)
        seen.add(None if record is None else len(record.attempts))
        begin_all(Ledger.open(run_dir, planned), planned)
        assert states(run_dir) == ["done"] * 3
    assert seen == {None, 1}


def test_beginning_and_publishing_phases(crashes: Crashes, plan: Callable[..., Plan]) -> None:
    planned = plan()
    seen: set[tuple[str, ...]] = set()
    for run_dir in crashes(lambda run_dir: Ledger.open(run_dir, planned), lambda d: begin_all(_reopened(d), planned)):
        now = tuple(states(run_dir))
        seen.add(now)
        assert now == tuple(sorted(now, key=["done", "running", "pending"].index)), "done, then at most one running"
        begin_all(Ledger.open(run_dir, planned), planned)
        record = read_record(run_dir)
        assert record is not None
        assert record.is_finished
        assert [phase.started_from for phase in record.phases[1:]] == [phase.published for phase in record.phases[:-1]]
    assert len(seen) == 7, "every state on the way was seen once at least"


def test_redoing_a_phase(crashes: Crashes, plan: Callable[..., Plan]) -> None:
    planned, changed = plan(), plan("phases.evolution.epochs=5")

    def redo(run_dir: RunDir) -> None:
        Ledger.open(run_dir, changed, redo_from="evolution")

    seen = set()
    for run_dir in crashes(lambda d: begin_all(Ledger.open(d, planned), planned), redo):
        record = read_record(run_dir)
        assert record is not None
        assert record.phases[0].state == "done", "what was not to be redone is untouched"
        seen.add((record.is_finished, record.archiving is not None))
        redo(run_dir) if record.is_finished else Ledger.open(run_dir, changed)
        assert states(run_dir) == ["done", "pending", "pending"]
        names = ["phase2_evolution", "phase3_pr_mastery"]
        assert sorted(path.name for path in run_dir.archive(1).iterdir()) == names, "nothing is lost, nothing stays"
        assert not any((run_dir.root / name).exists() for name in names)
    assert seen == {(True, False), (False, True), (False, False)}


def _reopened(run_dir: RunDir) -> Ledger:
    record = read_record(run_dir)
    assert record is not None
    return Ledger(run_dir, record)


@given(stops=st.lists(st.integers(1, 60), max_size=6))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_series_of_crashes_ends_in_the_same_run(
    stops: list[int], plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> None:
    planned = plan()
    run_dir = RunDir(tmp_path_factory.mktemp("run") / "here")
    for at in stops:
        killed(lambda run_dir: begin_all(Ledger.open(run_dir, planned), planned), run_dir, at, "kill")
    begin_all(Ledger.open(run_dir, planned), planned)
    record = read_record(run_dir)
    assert record is not None
    assert _without_times(record) == _without_times(_undisturbed(planned, tmp_path_factory))


def _undisturbed(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    run_dir = RunDir(tmp_path_factory.mktemp("run") / "here")
    begin_all(Ledger.open(run_dir, plan), plan)
    record = read_record(run_dir)
    assert record is not None
    return record


def _without_times(record: RunRecord) -> list[dict[str, Any]]:
    return [phase.model_dump(exclude={"started", "finished"}) for phase in record.phases]
