"""What Weights & Biases gets, read from the files that it writes when it is offline."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.errors import PhasedCptError
from phased_cpt.tracking.wandb import mode, open_wandb
from tests.tracking.shapes import WANDB, child, environment, killed, stretch, until

pytest.importorskip("wandb", reason="the extra `tracking` is not installed")

# Phase 1 whole, then phase 2 to its step 2.
TWO_PHASES = """
from phased_cpt.tracking import open_sinks
def phase(number, name, steps_before, end):
    known = stretch(Path(sys.argv[1]), number=number, phase=name, steps=3, steps_before=steps_before, wandb=WANDB)
    with open_sinks(known) as sinks:
        sinks.evaluated(evaluation(0, dataset=name))
        for number in range(1, end + 1):
            sinks.train(step(number))
phase(1, "foundation", 0, 3)
phase(2, "evolution", 3, 2)
"""
RESTART = """
from phased_cpt.tracking import open_sinks
with open_sinks(stretch(Path(sys.argv[1]), steps_before=3, begin=2, attempt=2, wandb=WANDB)) as sinks:
    sinks.train(step(3, loss=float("nan"), grad_norm=None))
    sinks.evaluated(evaluation(3, perplexity=None))
    ENDING
"""


def records(folder: Path) -> Iterator[Any]:
    """A file of 7 bytes and then blocks of 32 KiB, in which records are cut into pieces: LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little for the head of another piece
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history(folder: Path) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records(folder) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def offline(root: Path) -> list[Path]:
    return sorted((root / "wandb").glob("offline-run-*"))


def finish(program: str, root: Path, **settings: str) -> str:
    """What the program says on both its ends; its service has ended with it."""
    with child(program, root, env=environment(**settings), stdout=-1, stderr=-1) as process:
        out, err = process.communicate()
        assert until(lambda: not services(process.pid)), "nothing is left behind"
    return (out + err).decode()


def services(pid: int) -> list[str]:
    """The services that watch over this process."""
    lines = [_command(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    return [line for line in lines if "wandb-core" in line and line.rstrip().endswith(f"--pid {pid}")]


def _command(path: Path) -> str:
    try:
        return path.read_text().replace("\0", " ")
    except OSError:  # it has ended
        return ""


def test_two_phases_and_a_restart_are_one_run_on_one_axis_of_rising_steps(tmp_path: Path) -> None:
    said = finish(TWO_PHASES, tmp_path)
    said += finish(RESTART.replace("ENDING", "pass"), tmp_path)
    assert "wandb" not in said, "it is quiet"
    assert "phase 1/3 foundation" in said
    runs = [record.run for folder in offline(tmp_path) for record in records(folder) if record.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {("run1id", "tests", "tales")}
    rows = [row for folder in offline(tmp_path) for row in history(folder)]
    assert [row["curriculum_step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert [row["phase"] for row in rows] == [1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert (rows[0]["eval/foundation/loss"], rows[1]["train/loss"]) == (3.412, 3.2141)
    assert not {"train/loss", "train/grad_norm", "eval/evolution/perplexity"} & (set(rows[-2]) | set(rows[-1]))
    assert rows[-1]["eval/evolution/loss"] == 3.412
    metrics = [record.metric for record in records(offline(tmp_path)[0]) if record.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "curriculum_step" for metric in metrics)


def test_neither_code_nor_differences_nor_output_are_taken_along(tmp_path: Path) -> None:
    finish(RESTART.replace("ENDING", "print('a secret')"), tmp_path)
    (folder,) = offline(tmp_path)
    assert not {path.name for path in folder.rglob("*")} & {"output.log", "diff.patch"}
    kinds = {record.WhichOneof("record_type") for record in records(folder)}
    assert "history" in kinds
    assert not kinds & {"output", "output_raw"}


def test_an_exception_marks_the_run_as_failed(tmp_path: Path) -> None:
    for ending, code in (("raise ValueError", 1), ("pass", 0)):
        finish(RESTART.replace("ENDING", ending), tmp_path / ending[:4])
        (folder,) = offline(tmp_path / ending[:4])
        assert [record.exit.exit_code for record in records(folder) if record.HasField("exit")] == [code]


def test_a_killed_process_leaves_what_it_wrote_some_seconds_ago_and_no_service(tmp_path: Path) -> None:
    program = RESTART.replace("ENDING", "print('written', flush=True); time.sleep(600)")
    soon = environment(WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL="0.1")  # its own is 15 s
    with child(program, tmp_path, env=soon, stdout=-1, stderr=-1) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        assert services(process.pid), "there is one"
        assert until(lambda: len(history(offline(tmp_path)[0])) == 2)
        killed(process)
        assert until(lambda: not services(process.pid)), "and it ends by itself"
    assert [row["curriculum_step"] for row in history(offline(tmp_path)[0])] == [6, 6]


def test_without_the_network_training_starts_after_a_while_and_says_so(tmp_path: Path) -> None:
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    program = "from phased_cpt.tracking import wandb\nwandb.INIT_SECONDS = 2" + RESTART.replace("ENDING", "")
    begin = time.monotonic()
    said = finish(program, tmp_path, **nowhere)
    assert time.monotonic() - begin < 25
    assert said.count("wandb is left out from here on, training goes on: CommError") == 1
    assert said.count("wandb") == 1, "and nothing else of it"
    assert "step 3/40" in said


@pytest.mark.parametrize(
    ("given", "env", "means"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": ""}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("offline", {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, "offline"),
        ("online", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "online"),
    ],
)
def test_the_mode_follows_the_configuration_then_the_environment_then_the_key(
    given: Any, env: dict[str, str], means: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean(monkeypatch, **env)
    assert mode(replace(WANDB, mode=given)) == means


def test_a_key_in_netrc_is_a_key_for_its_host_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine api.wandb.ai login user password k\n")
    clean(monkeypatch, NETRC=str(path))
    assert mode(WANDB) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert mode(WANDB) == "offline"
    path.write_text("no netrc at all")
    assert mode(WANDB) == "offline"


def test_online_without_a_key_is_refused_instead_of_asking_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch)
    with pytest.raises(PhasedCptError, match="set WANDB_API_KEY"):
        mode(replace(WANDB, mode="online"))


def test_it_is_there_only_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch)
    assert open_wandb(stretch(tmp_path)) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert open_wandb(stretch(tmp_path, wandb=WANDB)) is None
    assert list(tmp_path.iterdir()) == []


def clean(monkeypatch: pytest.MonkeyPatch, **env: str) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"NETRC": "/nowhere"} | env).items():
        monkeypatch.setenv(name, value)
