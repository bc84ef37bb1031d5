"""All sinks together: whoever fails is told once and left out, and training goes on."""

import subprocess
import sys
from pathlib import Path

import pytest

from phased_cpt.errors import PhasedCptError
from phased_cpt.tracking import SINKS, Line, Sink, Sinks, Stretch, open_sinks
from tests.tracking.shapes import WANDB, child, evaluation, step, stretch


class Recorder:
    """Keeps what it was given."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.told: list[str] = []
        self.closed = 0

    def train(self, line: Line) -> None:
        self.steps.append(line["step"])

    def evaluated(self, line: Line) -> None:
        self.steps.append(line["step"])

    def tell(self, message: str) -> bool:
        self.told.append(message)
        return True

    def close(self) -> None:
        self.closed += 1


class Broken(Recorder):
    """Raises in one of its methods."""

    def __init__(self, method: str, reason: Exception) -> None:
        super().__init__()

        def fail(*_: object) -> bool:
            raise reason

        setattr(self, method, fail)


def all_of_it(sinks: Sinks) -> None:
    with sinks:
        for number in (1, 2, 3):
            sinks.train(step(number))
            sinks.evaluated(evaluation(number))
            sinks.tell("something")


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Every sink of the list by a recorder."""
    recorders = {name: Recorder() for name in SINKS}
    for name in SINKS:
        monkeypatch.setitem(SINKS, name, lambda _, name=name: recorders[name])
    return recorders


def test_the_sinks_are_these(tmp_path: Path) -> None:
    assert list(SINKS) == ["jsonl", "console", "training_log", "tensorboard", "wandb"]
    with open_sinks(stretch(tmp_path, tensorboard=True)) as sinks:
        sinks.train(step(1))
        sinks.evaluated(evaluation(1))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in files if "tfevents" not in path} == {
        "logs/training.log",
        "phase2_evolution/logs/eval.jsonl",
        "phase2_evolution/logs/train.jsonl",
    }
    assert len(files) == 4


@pytest.mark.requirement("G-04")
@pytest.mark.parametrize("method", ["train", "evaluated", "tell", "close"])
@pytest.mark.parametrize("name", SINKS)
def test_a_sink_that_raises_is_told_once_and_the_others_go_on(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders = recorded(monkeypatch)
    broken = Broken(method, OSError(28, "No space left on device"))
    monkeypatch.setitem(SINKS, name, lambda _: broken)
    all_of_it(open_sinks(stretch(tmp_path)))
    assert len(broken.steps) == {"train": 0, "evaluated": 1, "tell": 2, "close": 6}[method], "nothing after its failure"
    assert broken.closed == (method != "close"), "what it held was let go"
    del recorders[name]
    told = f"tracking: {name} is left out from here on, training goes on: OSError: [Errno 28] No space left on device"
    for other, recorder in recorders.items():
        assert recorder.steps == [1, 1, 2, 2, 3, 3]
        assert recorder.closed == 1
        if method != "close" or list(SINKS).index(other) < list(SINKS).index(name):  # closed from the end
            assert recorder.told.count(told) == 1
            assert len(recorder.told) == 4


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_that_cannot_be_opened_is_told_once_and_the_others_go_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Stretch) -> Sink:
        raise PhasedCptError("no\n  such thing")

    recorders = recorded(monkeypatch)
    monkeypatch.setitem(SINKS, name, refuse)
    all_of_it(open_sinks(stretch(tmp_path)))
    told = f"tracking: {name} is left out from here on, training goes on: no such thing"
    for recorder in (recorders[other] for other in SINKS if other != name):
        assert recorder.told == [told, *["something"] * 3]
        assert recorder.steps == [1, 1, 2, 2, 3, 3]


def test_where_all_fail_each_is_told_on_stderr_and_training_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    sinks = Sinks({name: Broken("train", ValueError(name)) for name in ("a", "b", "c")})
    all_of_it(sinks)
    err = capsys.readouterr().err
    assert err.count("c is left out from here on, training goes on: ValueError: c\n") == 1
    assert err.count("something\n") == 3, "the user still hears of everything"
    assert "a is left out" not in err, "those that stood yet were told"


def test_a_sink_that_fails_while_the_failure_of_another_is_told_is_left_out_as_well() -> None:
    recorder = Recorder()
    train, tell = Broken("train", ValueError("one")), Broken("tell", ValueError("two"))
    all_of_it(Sinks({"recorder": recorder, "train": train, "tell": tell}))
    assert [message.split(" ")[1] for message in recorder.told if "left out" in message] == ["train", "tell"]
    assert tell.steps == [], "it was left out before its turn came"
    assert recorder.steps == [1, 1, 2, 2, 3, 3]


def test_what_nobody_shows_is_told_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sinks = Sinks({"jsonl": SINKS["jsonl"](stretch(tmp_path)) or Recorder()})
    sinks.tell("nobody shows this")
    assert capsys.readouterr().err == "nobody shows this\n"
    Sinks({"one": Recorder()}).tell("somebody shows this")
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_not_a_failure_of_a_sink() -> None:
    class Stopped(Recorder):
        def train(self, line: Line) -> None:
            raise KeyboardInterrupt

    other = Recorder()
    with pytest.raises(KeyboardInterrupt), Sinks({"one": Stopped(), "other": other}) as sinks:
        sinks.train(step(1))
    assert (other.told, other.closed) == ([], 1)


@pytest.mark.parametrize(
    ("blocked", "name", "left"),
    [
        ("phase2_evolution", "jsonl", ["logs"]),
        ("logs", "training_log", ["phase2_evolution"]),
        ("tensorboard", "tensorboard", ["logs", "phase2_evolution"]),
    ],
)
def test_a_folder_that_cannot_be_made_costs_its_sink_alone(
    blocked: str, name: str, left: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / blocked).write_text("a file where a folder should be")
    all_of_it(open_sinks(stretch(tmp_path, tensorboard=True)))
    err = capsys.readouterr().err
    assert err.count("left out") == err.count(f"tracking: {name} is left out") == 1
    assert "step 1/40" in err
    assert all((tmp_path / folder).is_dir() for folder in left)


def test_a_missing_wandb_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    all_of_it(open_sinks(stretch(tmp_path, wandb=WANDB)))
    told = "tracking: wandb is left out from here on, training goes on: the package wandb is not installed: pip install wandb"
    assert capsys.readouterr().err.count(told) == 1
    assert told in (tmp_path / "logs" / "training.log").read_text()
    all_of_it(open_sinks(stretch(tmp_path)))
    assert "wandb" not in capsys.readouterr().err, "who does not want it needs it not"


LOADED = """
from phased_cpt.tracking import open_sinks
early = sorted({"wandb", "tensorboard"} & set(sys.modules))
open_sinks(stretch(Path(sys.argv[1]), tensorboard=True, wandb=WANDB)).close()
print(early, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_no_sink_loads_torch_or_tensorflow(tmp_path: Path) -> None:
    with child(LOADED, tmp_path, stdout=subprocess.PIPE) as process:
        early, *loaded = process.communicate()[0].decode().split()
    assert early == "[]", "what is slow is loaded where it is wanted"
    assert "tensorboard" in loaded
    assert not {"torch", "tensorflow", "transformers"} & set(loaded)
