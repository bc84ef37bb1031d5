"""One run at a time in a folder, and the kernel lets go when its holder dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phased_cpt.errors import RunIsBusy
from phased_cpt.ledger.locks import holder_of, rank_lock, run_lock
from phased_cpt.run_dir import RunDir


@contextmanager
def another_process_holds(kind: str, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    program = (
        "import sys, time; from pathlib import Path; from phased_cpt.ledger.locks import *; from phased_cpt.run_dir import RunDir\n"
        f"with {kind}(RunDir(Path({str(folder)!r})), *{list(arguments)!r}): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with (
        another_process_holds("run_lock", tmp_path) as holder,
        pytest.raises(RunIsBusy, match=rf"another run is at work here \(process {holder.pid} on .*, since 20"),
        run_lock(RunDir(tmp_path)),
    ):
        pass


def test_the_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    with another_process_holds("run_lock", tmp_path) as holder:
        assert holder_of(RunDir(tmp_path)) is not None
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert holder_of(RunDir(tmp_path)) is None
        with run_lock(RunDir(tmp_path)) as signature:
            assert signature


@pytest.mark.fault("F33", "a lock that outlives its holder, as on NFS", "named, with what to delete")
def test_a_lock_whose_holder_is_gone_is_told_as_that(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-Sc", ""])
    gone.wait()
    with another_process_holds("run_lock", tmp_path):
        lock = RunDir(tmp_path).lock
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"pid": gone.pid}))
        with (
            pytest.raises(RunIsBusy, match=rf"which is gone, .* delete {lock} if nobody else"),
            run_lock(RunDir(tmp_path)),
        ):
            pass
        lock.unlink()
        with run_lock(RunDir(tmp_path)):
            pass  # the control: that is all it takes


def test_ranks_that_outlive_their_conductor_keep_a_new_run_out(tmp_path: Path) -> None:
    with run_lock(RunDir(tmp_path)) as signature:
        rank = another_process_holds("rank_lock", tmp_path, signature)
        rank.__enter__()
        with rank_lock(RunDir(tmp_path), signature):
            pass  # another rank of the same job is welcome
    assert holder_of(RunDir(tmp_path)) == "ranks that outlived their run"
    with pytest.raises(RunIsBusy, match="ranks of an earlier job are still alive"), run_lock(RunDir(tmp_path)):
        pass
    rank.__exit__(None, None, None)
    with run_lock(RunDir(tmp_path)) as signature, rank_lock(RunDir(tmp_path), signature):
        pass


def test_a_rank_that_comes_late_to_a_dead_run_is_turned_away(tmp_path: Path) -> None:
    """It was launched, its conductor died while it was still importing, and another run has begun since."""
    with run_lock(RunDir(tmp_path)) as dead:
        pass
    with run_lock(RunDir(tmp_path)) as alive:
        assert dead != alive
        with pytest.raises(RunIsBusy, match="this rank belongs to an earlier run"), rank_lock(RunDir(tmp_path), dead):
            pass
        with rank_lock(RunDir(tmp_path), alive):
            pass


def test_a_forked_child_does_not_keep_what_its_parent_has_let_go(tmp_path: Path) -> None:
    with run_lock(RunDir(tmp_path)):
        if (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with run_lock(RunDir(tmp_path)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    with run_lock(RunDir(tmp_path)):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        with run_lock(RunDir(tmp_path)):
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_looking_at_the_lock_never_turns_a_run_away(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from phased_cpt.ledger.locks import holder_of; from phased_cpt.run_dir import RunDir\n"
        f"while True: holder_of(RunDir(Path({str(tmp_path)!r})))"
    )
    watchers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            with run_lock(RunDir(tmp_path)):
                pass
    finally:
        for watcher in watchers:
            watcher.kill()
            watcher.wait()


def test_two_who_look_at_once_do_not_see_each_other(tmp_path: Path) -> None:
    with run_lock(RunDir(tmp_path)):
        pass
    program = (
        "import time; from pathlib import Path; from phased_cpt.ledger.locks import *; from phased_cpt.run_dir import RunDir\n"
        f"until = time.monotonic() + 1.5; here = RunDir(Path({str(tmp_path)!r}))\n"
        "while time.monotonic() < until: assert holder_of(here) is None, holder_of(here)"
    )
    watchers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [watcher.wait() for watcher in watchers] == [0, 0, 0]


def test_status_sees_the_holder_and_needs_no_right_to_write(tmp_path: Path) -> None:
    assert holder_of(RunDir(tmp_path)) is None
    with another_process_holds("run_lock", tmp_path) as holder:
        (tmp_path / "run.lock").chmod(0o444)
        assert f"process {holder.pid} on " in (holder_of(RunDir(tmp_path)) or "")
    assert holder_of(RunDir(tmp_path)) is None
