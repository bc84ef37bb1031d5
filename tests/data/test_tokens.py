"""Token stores: keyed by what is in them, the same bytes for any number of workers, and never half of one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phased_cpt.data.cache import SEAL, sealed_facts
from phased_cpt.data.prepared import PreparedRun
from tests.conftest import Write
from tests.data.conftest import Prepare, lines

MANY = [{"text": f"document {number} says " + "word " * (number % 50)} for number in range(400)]


def stores(kind: str = "tokens") -> dict[str, dict[str, bytes]]:
    """Every sealed folder of the cache, by name, with the bytes of its files."""
    folders = sorted(file.parent for file in Path("outputs/cache").glob(f"{kind}/[!.]*/{SEAL}"))
    return {folder.name: {file.name: file.read_bytes() for file in sorted(folder.iterdir())} for folder in folders}


def cached(run: PreparedRun) -> list[bool]:
    return [phase.train.cached for phase in run.phases]


@pytest.mark.requirement("K-05", "K-10")
def test_any_number_of_workers_makes_the_same_bytes(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("phased_cpt.data.files.PIECE_BYTES", 1000)
    write(lines(*MANY), "a.jsonl")
    made = []
    for workers in (1, 2, 5):
        prepared("a.jsonl", workers=workers)
        made.append((stores("tokens"), stores("blocks")))
        Path("outputs").rename(tmp_path / f"done-{workers}")
    assert made[0] == made[1] == made[2]
    assert [len(part) for part in made[0]] == [1, 2], "one store, a block index for each side"


def test_what_is_in_a_file_decides_and_not_what_it_is_called(prepared: Prepare, write: Write) -> None:
    write(lines(*MANY), "a.jsonl")
    assert cached(prepared("a.jsonl")) == [False]
    assert cached(prepared("a.jsonl")) == [True]
    Path("a.jsonl").rename("b.jsonl")
    os.utime("b.jsonl", (0, 0))
    assert cached(prepared("b.jsonl")) == [True], "neither its name nor its date"
    write(lines(*MANY, {"text": "more"}), "b.jsonl")
    assert cached(prepared("b.jsonl")) == [False]


def test_a_byte_that_changes_under_the_same_size_and_date_is_seen(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "aaaa"}), "a.jsonl")
    os.utime("a.jsonl", (1, 1))
    first = prepared("a.jsonl").phases[0].train.stores[0].folder
    Path("a.jsonl").write_text(lines({"text": "bbbb"}))
    os.utime("a.jsonl", (1, 1))
    assert prepared("a.jsonl").phases[0].train.stores[0].folder != first


@pytest.mark.parametrize(
    ("set_", "again"),
    [
        ("data.text_field=text", True),  # what is read of a record is part of the name
        ("data.where={n: 1}", True),
        ("data.parse_special_tokens=true", True),
        ("model.eos_token=<|im_end|>", True),
        ("data.tokenizer_backend=tokenizers", False),  # the ids are the same
        ("data.max_tokens=32", False),
        ("data.overlap_tokens=1", False),
        ("data.packing=pad", False),
        ("data.split_seed=1", False),
        ("data.eval_share=0.2", False),
        ("run.seed=1", False),
        ("training.learning_rate=1e-3", False),
    ],
)
def test_tokens_are_made_again_only_if_they_would_differ(
    prepared: Prepare, write: Write, set_: str, again: bool
) -> None:
    write(lines(*({**record, "n": 1} for record in MANY)), "a.jsonl")
    prepared("a.jsonl")
    assert len(stores()) == 1
    prepared("a.jsonl", set_=(set_,))
    assert len(stores()) == (2 if again else 1)


def test_phases_and_runs_share_what_was_made(prepared: Prepare, write: Write) -> None:
    write(lines(*MANY), "a.jsonl")
    run = prepared("a.jsonl", "a.jsonl")
    assert cached(run) == [False, True]
    assert cached(prepared("a.jsonl", set_=("run.name=another",))) == [True]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "seal"])
@pytest.mark.parametrize("kind", ["tokens", "blocks"])
def test_damage_is_noticed_and_made_anew(
    prepared: Prepare, write: Write, capsys: pytest.CaptureFixture[str], damage: str, kind: str
) -> None:
    write(lines(*MANY), "a.jsonl")
    prepared("a.jsonl")
    before = stores(kind)
    folder = next(Path(f"outputs/cache/{kind}").glob("[!.]*/"))
    file = folder / {"tokens": "ids.bin", "blocks": "start.npy"}[kind]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        broken = {"flip": bytes(content), "cut": bytes(content[:-2]), "seal": b"{"}[damage]
        (folder / SEAL if damage == "seal" else file).write_bytes(broken)
    assert sealed_facts(folder) is None
    prepared("a.jsonl")
    assert stores(kind) == before
    assert "damaged; it is made anew" in capsys.readouterr().err


def test_two_processes_make_it_once(write: Write, config: Callable[..., Path]) -> None:
    write(lines(*MANY * 20), "a.jsonl")
    command = [sys.executable, "-m", "phased_cpt", "prepare", "-c", str(config("a.jsonl")), "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(process.communicate()[0])["phases"][0]["splits"]["train"] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(stores()) == 1
    assert answers[0]["tokens_trained"] == answers[1]["tokens_trained"]


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_killed_leaves_no_worker_and_nothing_that_counts(
    write: Write, config: Callable[..., Path], signal_: signal.Signals
) -> None:
    write(lines(*MANY * 500), "a.jsonl")  # 30 MB: seconds, by the reference
    path = config("a.jsonl", tokenizer_backend="tokenizers")
    command = [sys.executable, "-m", "phased_cpt", "prepare", "-c", str(path), "--workers", "2"]
    default = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731 - nohup has it ignored
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    deadline = time.monotonic() + 60
    children: list[str] = []
    while len(children) < 2 and time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.02)
    try:
        process.send_signal(signal_)
        assert "Traceback" not in process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == (130 if signal_ == signal.SIGINT else -signal_)
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children)), "a worker outlived its parent"
    assert stores() == {}


def test_a_worker_that_is_killed_is_told(write: Write, config: Callable[..., Path]) -> None:
    """As the system does it when memory is short; in the middle of whatever it is at."""
    write(lines(*MANY * 500), "a.jsonl")
    path = config("a.jsonl", tokenizer_backend="tokenizers")
    command = [sys.executable, "-m", "phased_cpt", "prepare", "-c", str(path), "--workers", "2"]
    for wait in (0.0, 0.3, 0.8):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline, children = time.monotonic() + 60, list[str]()
        while len(children) < 2 and time.monotonic() < deadline:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            time.sleep(0.01)
        time.sleep(wait)
        try:
            os.kill(int(children[0]), signal.SIGKILL)
            told = process.communicate(timeout=60)[1]
        finally:
            process.kill()
        assert process.returncode == 1
        assert told == "a worker that tokenises was killed; if memory was short, try --workers 1\n"
        assert stores() == {}


def alive(process: str) -> bool:
    """Running; one that is dead may lie about until somebody collects it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
