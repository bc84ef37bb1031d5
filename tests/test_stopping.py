"""Signals that are real, in this process and in others."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from phased_cpt.errors import Interrupted
from phased_cpt.stopping import STOPS, Asked, Stopping, Wish, heard


@pytest.fixture
def stop() -> Iterator[Stopping]:
    before = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGUSR1, signal.SIGALRM)}
    with heard() as ears:
        yield ears
    assert {number: signal.getsignal(number) for number in before} == before, "all is as it was"


@pytest.mark.parametrize("number", STOPS)
def test_where_nothing_is_held_a_stop_is_an_exception_at_once(stop: Stopping, number: signal.Signals) -> None:
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    with pytest.raises(Asked):
        os.kill(os.getpid(), number)
    with pytest.raises(Interrupted, match=rf"^stopped \({name}\); the same command goes on$") as stopped:
        stop.require_on()
    assert stopped.value.exit_code == 75


def test_where_it_is_held_a_stop_is_a_wish_and_the_next_unheld_place_ends_it(stop: Stopping) -> None:
    with stop.held():
        assert stop.wish() == Wish.NOTHING
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.wish() == Wish.SAVE
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at the same moment: from a terminal, say, by way of a launcher
        assert stop.wish() == Wish.STOP, "which is more"
        stop.saved()
        assert stop.wish() == Wish.STOP
    with pytest.raises(Interrupted, match="SIGTERM"):
        stop.require_on()


def test_the_clock_asks_too(stop: Stopping) -> None:
    with stop.held():
        stop.stop_in(0.05)
        deadline = time.monotonic() + 10
        while stop.wish() == Wish.NOTHING and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (stop.wish(), stop.asked_by) == (Wish.STOP, "the time that --minutes gives is over")


def test_whoever_listens_further_in_has_the_same_ears(stop: Stopping) -> None:
    with heard() as again, again.held():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.wish() == Wish.STOP


def test_a_forked_child_hears_for_itself(stop: Stopping) -> None:
    """Its signals would be written into the pipe of its parent."""
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert stop.wish() == Wish.NOTHING


PROGRAM = """
import ctypes, os, signal, sys, time
from phased_cpt import stopping
{before}
with stopping.heard() as stop:
    try:
        {first}
        print("ready", flush=True)
        {does}
    except stopping.Asked:
        print("by itself", flush=True)
        os._exit(7)
"""
# A library that waits and does not look at signals: a mutex that this thread holds already.
BLOCKED = (
    "mutex = ctypes.create_string_buffer(128); lock = ctypes.CDLL(None).pthread_mutex_lock; lock(mutex); lock(mutex)"
)
HELD = "hold = stop.held(); hold.__enter__()"
LONG = "[time.sleep(0.05) for _ in range(400)]"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def run(
    started: list[subprocess.Popen[str]], does: str, first: str = "pass", before: str = ""
) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM.format(does=does, first=first, before=before)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_a_process_that_waits_in_a_library_is_ended_all_the_same(started: list[subprocess.Popen[str]]) -> None:
    """Python runs no handler there; a rank whose peer is gone is in such a place."""
    process = run(started, BLOCKED)
    time.sleep(0.3)  # until it waits
    process.terminate()
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out, said) == (75, "", "stopped; the same command goes on\n")


def test_a_held_process_is_not_ended_by_one_signal_and_is_at_once_by_a_second(
    started: list[subprocess.Popen[str]],
) -> None:
    process = run(started, LONG, HELD)
    process.terminate()
    time.sleep(1.3)
    assert process.poll() is None, "it waits for its step"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "asked twice: stopped at once\n"
    assert process.returncode == 75


def test_a_scheduler_may_ask_after_the_clock_has(started: list[subprocess.Popen[str]]) -> None:
    """The first that a person or a scheduler asks for is no second one."""
    process = run(started, LONG, f"{HELD}; stop.stop_in(0.01)")
    time.sleep(1.3)
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None
    time.sleep(0.8)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_under_nohup_a_closed_terminal_is_no_stop(started: list[subprocess.Popen[str]]) -> None:
    process = run(started, "time.sleep(60)", before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.communicate(timeout=30)[0] == "by itself\n"
    assert process.returncode == 7


def test_no_library_takes_a_stop_for_a_failure_of_its_own_and_outside_it_is_one() -> None:
    """Many catch every Exception, and try another way, or accuse the user's file."""
    with pytest.raises(Interrupted, match=r"^stopped \(SIGTERM\); the same command goes on$"), heard():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")


def test_in_a_thread_the_clock_asks_without_a_signal() -> None:
    wishes: list[Wish] = []

    def waits() -> None:
        with heard() as stop:
            stop.stop_in(0.05)
            time.sleep(0.3)
            wishes.append(stop.wish())

    thread = threading.Thread(target=waits)
    thread.start()
    thread.join()
    assert wishes == [Wish.STOP]
