"""One run at a time in a folder, and the kernel lets go when its holder dies."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phased_cpt.errors import RunIsBusy
from phased_cpt.locks import holder_of, rank_lock, run_lock
from phased_cpt.run_dir import RunDir


@contextmanager
def another_process_holds(kind: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    program = (
        "import sys, time; from pathlib import Path; from phased_cpt.locks import *; from phased_cpt.run_dir import RunDir\n"
        f"with {kind}(RunDir(Path({str(folder)!r}))): print('held', flush=True); time.sleep(60)"
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
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run_lock(RunDir(tmp_path)):
            pass


def test_ranks_that_outlive_their_conductor_keep_a_new_run_out(tmp_path: Path) -> None:
    with another_process_holds("rank_lock", tmp_path):
        with rank_lock(RunDir(tmp_path)):
            pass  # another rank of the same job is welcome
        with pytest.raises(RunIsBusy, match="ranks of an earlier run are still alive"), run_lock(RunDir(tmp_path)):
            pass
    with run_lock(RunDir(tmp_path)), rank_lock(RunDir(tmp_path)):
        pass


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
        "from pathlib import Path; from phased_cpt.locks import holder_of; from phased_cpt.run_dir import RunDir\n"
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


def test_status_sees_the_holder_and_needs_no_right_to_write(tmp_path: Path) -> None:
    assert holder_of(RunDir(tmp_path)) is None
    with another_process_holds("run_lock", tmp_path) as holder:
        (tmp_path / "run.lock").chmod(0o444)
        assert f"process {holder.pid} on " in (holder_of(RunDir(tmp_path)) or "")
    assert holder_of(RunDir(tmp_path)) is None
