"""What is asked of a conductor is asked of its ranks, also behind a launcher; and who gives no sign is noticed."""

import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from phased_cpt.errors import Interrupted, PhasedCptError
from phased_cpt.launchers import start
from phased_cpt.stopping import Stopping
from tests.launchers.programs import SLEEPS, Jobs, asks, is_alive, is_gone_soon, pid_of


@pytest.mark.parametrize("session", [False, True], ids=["as launch.py", "as torchrun"])
def test_a_stop_goes_to_the_ranks_and_not_to_their_launcher(session: bool, job: Jobs, tmp_path: Path) -> None:
    stop = Stopping()
    asks(stop, signal.SIGTERM, tmp_path / "trains-0", tmp_path / "trains-1")
    with pytest.raises(Interrupted, match=r"^stopped after step 7$") as stopped:
        start.launched([job.launcher("train(0)", "train(1)", session=session)], job.logs, stop, math.inf)
    assert stopped.value.exit_code == 75
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM ", "SIGTERM "]
    assert not (tmp_path / "launcher was told").exists()
    with pytest.raises(PhasedCptError):  # the control: a launcher that is told says so
        start.launched(
            [job.launcher("os.kill(os.getppid(), signal.SIGTERM); sleep(60)")], job.logs, Stopping(), math.inf
        )
    assert (tmp_path / "launcher was told").exists()


def test_a_rank_that_comes_late_is_told_then(job: Jobs, tmp_path: Path) -> None:
    stop = Stopping()
    late = "wait('heard-0'); sleep(0.2); train(1)"
    first = "train(0, code=0); wait('heard-1'); word(0, 75, 'stopped'); os._exit(75)"
    asks(stop, signal.SIGTERM, tmp_path / "trains-0")
    with pytest.raises(Interrupted, match=r"^stopped"):
        start.launched([job.launcher(first, late)], job.logs, stop, math.inf)
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM ", "SIGTERM "]


def test_a_rank_that_leaves_by_itself_is_followed_by_the_others(job: Jobs, tmp_path: Path) -> None:
    """It alone was told, and all have agreed on the step: the others are not ended over their checkpoint."""
    follows = "wait('trains-0'); signal.signal(signal.SIGTERM, lambda *_: say('was told')); wait('logs/failed-0.json')"
    follows += "; sleep(0.7); say('sealed'); word(1, 75, 'stopped'); os._exit(75)"
    stop = Stopping()

    def tell() -> None:
        os.kill(pid_of(tmp_path / "trains-0"), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(Interrupted, match=r"^stopped after step 7$"):
        start.launched(job("train(0)", follows), job.logs, stop, math.inf)
    assert (tmp_path / "sealed").exists()
    assert not (tmp_path / "was told").exists()


def test_one_that_does_not_follow_is_ended(job: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "GRACE_SECONDS", 0.5)
    with pytest.raises(Interrupted, match=r"^rank 0 was stopped; the same command goes on$"):
        start.launched(job("wait('1.pid'); os._exit(75)", SLEEPS), job.logs, Stopping(), math.inf)
    assert not is_alive(pid_of(tmp_path / "1.pid"))


WORDS = {
    "a full disk, though another has left well": ([(0, 75, {}), (1, 1, {})], False),
    "what was not foreseen, and came first": ([(1, 1, {"unexpected": True}), (0, 75, {})], False),
    "a broken connection, as another has left": ([(0, 75, {}), (1, 1, {"unexpected": True})], True),
}


@pytest.mark.parametrize("which", WORDS)
def test_the_word_that_tells_how_a_stop_has_ended(which: str, job: Jobs, tmp_path: Path) -> None:
    words, is_a_stop = WORDS[which]
    said = "; ".join(f"word({rank}, {code}, 'of {rank}', **{more}); sleep(0.05)" for rank, code, more in words)
    stop = Stopping()
    asks(stop, signal.SIGTERM, tmp_path / "trains-0")
    with pytest.raises(PhasedCptError) as failure:
        start.launched(job(f"train(0, code=0); {said}; os._exit(1)"), job.logs, stop, math.inf)
    assert isinstance(failure.value, Interrupted) == is_a_stop
    assert failure.value.exit_code == (75 if is_a_stop else 1)
    assert str(failure.value) == ("of 0" if is_a_stop else "of 1")


def test_a_rank_that_is_killed_during_a_stop_is_told_of(job: Jobs, tmp_path: Path) -> None:
    """No word says that anything was kept."""
    stop = Stopping()
    asks(stop, signal.SIGTERM, tmp_path / "trains-0")
    with pytest.raises(PhasedCptError, match=r"rank 0 was ended by SIGKILL, as the system does when memory") as failure:
        start.launched(job("train(0, code=0); os.kill(os.getpid(), 9)"), job.logs, stop, math.inf)
    assert failure.value.exit_code == 1


def test_a_phase_that_ends_well_all_the_same_is_done(job: Jobs, tmp_path: Path) -> None:
    stop = Stopping()
    asks(stop, signal.SIGTERM, tmp_path / "trains-0")
    start.launched(job("train(0, code=0)"), job.logs, stop, math.inf)
    with pytest.raises(Interrupted):
        stop.require_on()


def test_a_checkpoint_is_asked_of_every_rank_and_they_train_on(job: Jobs, tmp_path: Path) -> None:
    stop = Stopping()
    asks(stop, signal.SIGUSR1, tmp_path / "trains-0", tmp_path / "trains-1")
    asks(stop, signal.SIGTERM, tmp_path / "later")
    first = "import threading; threading.Timer(1.0, lambda: say('later')).start(); train(0)"
    with pytest.raises(Interrupted):
        start.launched(job(first, "train(1)"), job.logs, stop, math.inf)
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1 SIGTERM "] * 2


def test_a_rank_that_cannot_hear_of_a_checkpoint_lives_on(job: Jobs, tmp_path: Path) -> None:
    stop = Stopping()
    asks(stop, signal.SIGUSR1, tmp_path / "deaf")
    deaf = "from phased_cpt.pulse import Beating; Beating(logs, 0); say('deaf'); sleep(0.8)"
    start.launched(job(deaf), job.logs, stop, math.inf)  # SIGUSR1 ends whoever has no handler


# Hanging ----------------------------------------------------------------------------------------------------------------

STACKS = "import faulthandler; file = open(logs / 'stacks-{0}.txt', 'w'); faulthandler.register(signal.SIGUSR2, file); "


def test_a_rank_that_was_stopped_is_named_first_and_all_are_killed(job: Jobs, tmp_path: Path) -> None:
    waits = STACKS.format(0) + "train(0, beats=False)"
    frozen = STACKS.format(1) + "wait('trains-0'); sleep(0.1); train(1, beats=False)"

    def freeze() -> None:
        os.kill(pid_of(tmp_path / "trains-1"), signal.SIGSTOP)

    threading.Thread(target=freeze, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(PhasedCptError) as failure:
        start.launched(job(waits, frozen), job.logs, Stopping(), 2.0)
    assert 2.0 < time.monotonic() - began < 15
    told, first, second, advice = str(failure.value).splitlines()
    assert told.startswith(f"{job.here.name}: no rank has given a sign for 2 s (launch.hang_minutes: 0.0333")
    assert first.startswith("    rank 1: starting, step 0; its last sign was ")
    assert first.endswith(" s ago; stopped by a signal")
    assert second.startswith("    rank 0: ")
    assert second.endswith(" s ago")
    assert f"{job.logs}/stacks-<rank>.txt" in advice
    assert "launch.hang_minutes" in advice
    assert failure.value.exit_code == 1
    assert "in train" in (job.logs / "stacks-0.txt").read_text()
    assert not any(is_alive(pid_of(tmp_path / f"{rank}.pid")) for rank in (0, 1))


def test_a_frozen_rank_of_a_launcher_with_sessions_of_its_own_is_killed_too(job: Jobs, tmp_path: Path) -> None:
    rank = "from phased_cpt.launchers.parents import die_with_the_parent; die_with_the_parent(); "
    rank += "train(0, code=0, beats=False)"
    command = job.launcher(rank, session=True)

    def freeze() -> None:
        os.kill(pid_of(tmp_path / "trains-0"), signal.SIGSTOP)

    threading.Thread(target=freeze, daemon=True).start()
    with pytest.raises(PhasedCptError, match="stopped by a signal"):
        start.launched([command], job.logs, Stopping(), 1.5)
    assert is_gone_soon(pid_of(tmp_path / "trains-0"))


def test_one_rank_that_gives_signs_is_enough(job: Jobs, tmp_path: Path) -> None:
    """The others may wait for it, and the end of a job takes its pulses with it."""
    works = (
        "import threading; threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start(); train(0, code=0)"
    )
    start.launched(job(works, "train(1, code=0, beats=False) if 0 else sleep(3)"), job.logs, Stopping(), 1.5)


def test_a_job_none_of_whose_ranks_gives_a_sign(job: Jobs, tmp_path: Path) -> None:
    with pytest.raises(PhasedCptError, match="no rank has come so far as to give a sign"):
        start.launched(job(SLEEPS), job.logs, Stopping(), 0.5)
    assert not is_alive(pid_of(tmp_path / "0.pid"))
