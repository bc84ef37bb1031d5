"""What stands in train.jsonl and eval.jsonl, after restarts and kills, too."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from phased_cpt.tracking.jsonl import Jsonl
from tests.tracking.shapes import child, evaluation, killed, step, stretch, until

FOREVER = """
from itertools import count
from phased_cpt.tracking.jsonl import Jsonl
sink = Jsonl(stretch(Path(sys.argv[1])))
for number in count(1):
    sink.train(step(number))
"""


def logs(root: Path) -> Path:
    return root / "phase2_evolution" / "logs"


def read(path: Path) -> list[Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read(path)]


def attempt(root: Path, begin: int, end: int, number: int = 1) -> None:
    """An evaluation before the first step of a fresh start, and after every second one."""
    sink = Jsonl(stretch(root, begin=begin, attempt=number))
    for done in range(begin, end + 1):
        if done > begin:
            sink.train(step(done, loss=number))
        if done % 2 == 0 and (done > begin or not begin):
            sink.evaluated(evaluation(done))
    sink.close()


def test_a_line_is_read_back_as_it_was_given(tmp_path: Path) -> None:
    sink = Jsonl(stretch(tmp_path))
    sink.train(step(1, mfu=0.41))
    sink.evaluated(evaluation(1, dataset="Märchen"))
    assert read(logs(tmp_path) / "train.jsonl") == [step(1, mfu=0.41)], "before the file is closed"
    assert read(logs(tmp_path) / "eval.jsonl") == [evaluation(1, dataset="Märchen")]
    assert read(logs(tmp_path) / "eval.jsonl") != [evaluation(1)]
    sink.close()


def test_what_is_not_finite_is_null_and_a_number_of_numpy_is_a_number(tmp_path: Path) -> None:
    sink = Jsonl(stretch(tmp_path))
    sink.train(step(1, loss=math.nan, grad_norm=math.inf, learning_rate=np.float32("-inf"), mfu=np.float32(0.5)))
    sink.evaluated(evaluation(np.int64(1), perplexity=None, of=[math.nan, {"a": math.inf}]))
    sink.close()
    (line,) = read(logs(tmp_path) / "train.jsonl")
    assert (line["loss"], line["grad_norm"], line["learning_rate"], line["mfu"]) == (None, None, None, 0.5)
    (line,) = read(logs(tmp_path) / "eval.jsonl")
    assert (line["step"], line["perplexity"], line["of"]) == (1, None, [None, {"a": None}])


def test_each_step_is_there_once_after_a_restart_and_what_is_done_again_is_kept_aside(tmp_path: Path) -> None:
    attempt(tmp_path, 0, 5)
    attempt(tmp_path, 3, 6, number=2)
    train = read(logs(tmp_path) / "train.jsonl")
    assert [(line["step"], line["loss"]) for line in train] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert steps(logs(tmp_path) / "eval.jsonl") == [0, 2, 4, 6]
    assert read(logs(tmp_path) / "replayed-2.jsonl") == [step(4, loss=1), step(5, loss=1), evaluation(4)]
    assert not (logs(tmp_path) / "replayed-1.jsonl").exists(), "a first attempt does nothing again"


def test_a_fresh_start_keeps_nothing_not_even_the_evaluation_of_step_0(tmp_path: Path) -> None:
    attempt(tmp_path, 0, 2)
    attempt(tmp_path, 0, 1, number=2)
    assert steps(logs(tmp_path) / "train.jsonl") == [1]
    assert steps(logs(tmp_path) / "eval.jsonl") == [0]
    assert steps(logs(tmp_path) / "replayed-2.jsonl") == [1, 2, 0, 2]


def test_a_restart_that_does_nothing_again_leaves_the_files_alone(tmp_path: Path) -> None:
    attempt(tmp_path, 0, 4)
    path = logs(tmp_path) / "train.jsonl"
    before = path.stat().st_ino
    attempt(tmp_path, 4, 5, number=2)
    assert path.stat().st_ino == before
    attempt(tmp_path, 4, 5, number=3)
    assert path.stat().st_ino != before, "and one that does is published beside and renamed"
    assert sorted(path.name for path in logs(tmp_path).iterdir()) == ["eval.jsonl", "replayed-3.jsonl", "train.jsonl"]


def test_a_torn_last_line_is_dropped_and_a_whole_one_without_its_end_is_not(tmp_path: Path) -> None:
    attempt(tmp_path, 0, 3)
    path = logs(tmp_path) / "train.jsonl"
    whole = path.read_bytes()
    for tail, left in ((b'{"ts": "2026-11', [1, 2, 3]), (b'{"step": 4}', [1, 2, 3, 4]), (b"\0\0\0", [1, 2, 3])):
        path.write_bytes(whole + tail)
        Jsonl(stretch(tmp_path, begin=4, attempt=2)).close()
        assert steps(path) == left


def test_a_process_that_is_killed_in_mid_write_loses_no_line_that_was_given(tmp_path: Path) -> None:
    path = logs(tmp_path) / "train.jsonl"
    with child(FOREVER, tmp_path) as process:
        assert until(lambda: path.exists() and path.stat().st_size > 100_000)
        killed(process)
    written = path.read_bytes().count(b"\n")
    Jsonl(stretch(tmp_path, begin=100, attempt=2)).close()
    assert steps(path) == list(range(1, 101))
    assert steps(logs(tmp_path) / "replayed-2.jsonl") == list(range(101, written + 1))


def test_a_kill_while_the_replayed_steps_are_cut_off_loses_none(tmp_path: Path, monkeypatch: Any) -> None:
    attempt(tmp_path, 0, 4)
    monkeypatch.setattr("phased_cpt.tracking.jsonl.publish_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        Jsonl(stretch(tmp_path, begin=2, attempt=2))
    except KeyboardInterrupt:
        monkeypatch.undo()
    assert steps(logs(tmp_path) / "train.jsonl") == [1, 2, 3, 4]
    Jsonl(stretch(tmp_path, begin=2, attempt=3)).close()
    assert steps(logs(tmp_path) / "train.jsonl") == [1, 2]
    assert steps(logs(tmp_path) / "replayed-3.jsonl") == [3, 4, 4]


def test_others_may_read_the_files(tmp_path: Path) -> None:
    attempt(tmp_path, 0, 3)
    attempt(tmp_path, 1, 2, number=2)
    modes = {path.name: path.stat().st_mode & 0o777 for path in logs(tmp_path).iterdir()}
    other = tmp_path / "other"
    other.touch()
    assert set(modes.values()) == {other.stat().st_mode & 0o777}, "what the umask gives to any file"
