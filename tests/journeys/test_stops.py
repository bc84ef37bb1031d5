"""Asked to stop, wherever it is, a run leaves a whole checkpoint, exit code 75 and no process; and goes on to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.errors import Interrupted
from phased_cpt.pulse import pulses
from phased_cpt.sealed import CHECKPOINT, fault_of, of_kind
from phased_cpt.stopping import LEAVING_SECONDS
from tests.conftest import REPOSITORY
from tests.journeys.conftest import Ran, Tiny, lines
from tests.journeys.runs import all_of
from tests.zygote import ForkedJobs, Zygote, shell

HERE = "tests.journeys.test_stops"
BIN = Path(sys.executable).parent
LOGS = Path("run/phase1_foundation/logs")
CHECKPOINTS = Path("run/phase1_foundation/checkpoints")


def short(tiny: Tiny, steps: int = 4, **sections: Any) -> dict[str, Any]:
    """One phase with dropout."""
    config = tiny(**sections)
    config["lora"]["dropout"] = 0.1
    return config | {"phases": [config["phases"][0] | {"max_steps": steps}]}


def signalled(doing: str, at: int, rank: int, signals: list[int], program: str, arguments: list[str]) -> None:
    """In the ranks: one that gets signals when it is about to do something at a step."""
    from phased_cpt import worker
    from phased_cpt.pulse import Beating

    beat, left = Beating.beat, list(signals)

    def beats(self: Beating, doing_now: str | None = None, step: int | None = None) -> None:
        beat(self, doing_now, step)
        if self._doing == doing and at in (0, step) and os.environ["RANK"] == str(rank):
            while left:
                os.kill(os.getpid(), left.pop(0))

    Beating.beat = beats  # type: ignore[method-assign]
    {"worker": worker.main, "shell": shell}[program](arguments)


def door(zygote: Zygote, doing: str, step: int = 0, rank: int = 1, signals: tuple[int, ...] = (signal.SIGTERM,)) -> Any:
    return ForkedJobs(zygote, 2, f"{HERE}:signalled", (doing, step, rank, list(signals), "worker"))


@pytest.fixture
def whole(tiny: Tiny, ran: Ran) -> Callable[..., dict[str, Any]]:
    """What a configuration comes to without a stop."""

    def run(config: dict[str, Any]) -> dict[str, Any]:
        ran(config)
        found = all_of(Path("run"))
        shutil.rmtree("run")
        return found

    return run


# To one rank, whatever it is doing --------------------------------------------------------------------------------------

STOPS = {  # what the rank is doing, at which step: after which step all of them have stopped
    ("loading the model", 0): 0,
    ("starting the engine", 0): 0,
    ("evaluating before the first step", 0): 0,
    ("training", 2): 2,
    ("training", 3): 3,
    ("evaluating", 3): 2,
    ("saving the best weights", 0): 2,
    ("saving a checkpoint", 0): 2,
}


@pytest.mark.requirement("P-08")
def test_a_rank_that_is_asked_to_stop_takes_the_others_with_it_at_one_step(
    tiny: Tiny, ran: Ran, zygote: Zygote, whole: Callable[..., dict[str, Any]]
) -> None:
    """While it saves, the step after is the one; what it has not begun with, it leaves at once."""
    config = short(tiny, checkpoint={"every_steps": 1})
    expected = whole(config)
    for (doing, step), stopped_after in STOPS.items():
        with pytest.raises(Interrupted, match=r"the same command goes on"):
            ran(config, door=door(zygote, doing, step))
        found = of_kind(CHECKPOINTS, CHECKPOINT)
        assert [at for at, _ in found][:1] == [stopped_after or 0][: len(found)], f"{doing} {step}"
        assert not [each for each in pulses(LOGS).values() if is_alive(each.pid)], f"{doing}: somebody is left"
        ran(config)
        assert all_of(Path("run")) == expected, f"{doing} {step}"
        shutil.rmtree("run")


def test_who_is_asked_while_a_phase_is_published_publishes_it(tiny: Tiny, ran: Ran, zygote: Zygote) -> None:
    config = short(tiny)
    assert ran(config, door=door(zygote, "publishing")).finished


def test_asked_for_a_checkpoint_it_makes_one_and_goes_on(
    tiny: Tiny, ran: Ran, zygote: Zygote, whole: Callable[..., dict[str, Any]]
) -> None:
    config = short(tiny, checkpoint={"keep_published": True})
    assert not list(Path().glob("run/*/checkpoints"))
    expected = whole(config)
    assert ran(config, door=door(zygote, "training", 2, signals=(signal.SIGUSR1,))).finished
    assert [step for step, _ in of_kind(CHECKPOINTS, CHECKPOINT)] == [2]
    found = all_of(Path("run"))
    assert found["weights"] == expected["weights"] and found["steps"] == expected["steps"]


def with_a_slow_sink(arguments: list[str]) -> None:
    """In the ranks: one is asked to stop, and the logs of the first take longer to close than a stop otherwise may."""
    from phased_cpt.tracking.jsonl import Jsonl

    close = Jsonl.close

    def slowly(self: Jsonl) -> None:
        time.sleep(LEAVING_SECONDS + 1.5)
        close(self)
        Path("closed").touch()

    Jsonl.close = slowly  # type: ignore[method-assign]
    signalled("training", 2, 0, [signal.SIGTERM], "worker", arguments)


def test_a_stop_waits_for_logs_that_close_slowly(tiny: Tiny, ran: Ran, zygote: Zygote) -> None:
    """W&B may have to send what it has."""
    with pytest.raises(Interrupted, match="with a checkpoint"):
        ran(short(tiny), door=ForkedJobs(zygote, 2, f"{HERE}:with_a_slow_sink"))
    assert Path("closed").exists()


# As it is typed ---------------------------------------------------------------------------------------------------------


def typed(*words: str) -> subprocess.Popen[str]:
    """In a shell whose PATH has the shim before the environment; in a session of its own, as in a terminal."""
    path = f"{REPOSITORY}/launch/bin:{BIN}:{os.environ['PATH']}"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    return subprocess.Popen(
        words, env={**environment, "PATH": path, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def when_it_trains(process: subprocess.Popen[str], beyond: int) -> list[int]:
    """Wait until a step is taken after this one; returns the ranks' process ids."""
    deadline = time.monotonic() + 120
    while steps_so_far() <= beyond:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "it does not train"
        time.sleep(0.02)
    return [pulse.pid for pulse in pulses(LOGS).values()]


def steps_so_far() -> int:
    path = LOGS / "train.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


WAYS: dict[str, tuple[tuple[str, ...], signal.Signals, bool]] = {  # what is typed, the signal, to a rank alone
    "run, Ctrl-C": (("phased-cpt", "run", "-c", "run.json"), signal.SIGINT, False),
    "run, a rank": (("phased-cpt", "run", "-c", "run.json"), signal.SIGTERM, True),
    "deepspeed": (("deepspeed", "--num_gpus=2", "-m", "phased_cpt", "-c", "run.json"), signal.SIGTERM, False),
}


@pytest.mark.requirement("P-08", "R-02", "S-03")
def test_whoever_started_it_is_asked_to_stop_and_any_way_goes_on(
    tiny: Tiny, ran: Ran, whole: Callable[..., dict[str, Any]]
) -> None:
    config = short(tiny, steps=200, evaluation={"every_steps": 50}, launch={"num_gpus": 2})
    expected = whole(config)
    Path("run.json").write_text(json.dumps(config))
    at = 0
    for way, (words, asked, a_rank_alone) in WAYS.items():
        process = typed(*words)
        ranks = when_it_trains(process, at)
        os.kill(ranks[0] if a_rank_alone else process.pid, asked)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 75, f"{way}: {said[-3000:]}"
        assert "with a checkpoint; the same command goes on" in said and "Traceback" not in said, (
            f"{way}: {said[-3000:]}"
        )
        assert not [pid for pid in ranks if is_alive(pid)], way
        stopped, folder = of_kind(CHECKPOINTS, CHECKPOINT)[0]
        record = json.loads(Path("run/run.json").read_text())
        assert fault_of(folder, record["phases"][0]["fingerprint"]["digest"]) is None
        assert at < stopped < 200 and lines(LOGS / "train.jsonl")[-1]["step"] == stopped, way
        at = stopped
    ran(config)
    found = all_of(Path("run"))
    assert found["weights"] == expected["weights"] and found["steps"] == expected["steps"]
    assert found["evaluations"] == expected["evaluations"]


def children_of(pid: int) -> list[int]:
    stats = (path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists())
    fields = ((int(stat.split()[0]), stat.rpartition(")")[2].split()) for stat in stats)
    return [child for child, rest in fields if int(rest[1]) == pid]


@pytest.mark.requirement("P-08")
def test_a_stop_while_the_data_is_prepared_leaves_at_once_and_nobody_behind(tiny: Tiny) -> None:
    """What is done of it is not done again."""
    config = short(tiny, run={"cache_dir": "cache"})
    words = (Path(config["phases"][0]["sources"]).read_text() + "\n") * 40
    texts = [{"text": f"{at} {line}"} for at, line in enumerate(words.splitlines())]
    Path("large.jsonl").write_text("\n".join(map(json.dumps, texts)))
    Path("run.json").write_text(json.dumps(config | {"phases": [{"name": "one", "sources": "large.jsonl"}]}))
    process = typed("phased-cpt", "run", "-c", "run.json", "--run-dir", "run")
    deadline = time.monotonic() + 60
    while len(children := children_of(process.pid)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.terminate()
    said = process.communicate(timeout=30)[0]
    assert (process.returncode, said.splitlines()[-1]) == (75, "stopped (SIGTERM); the same command goes on"), said
    assert "Traceback" not in said
    time.sleep(0.2)
    assert not [child for child in children if is_alive(child)]
    assert not Path("run/phase1_one").exists(), "the control: it had not begun to train"
