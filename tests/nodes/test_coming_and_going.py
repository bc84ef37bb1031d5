"""Nodes are called in any order, stopped and called again, at any time: node 0 takes them as they come."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from phased_cpt.errors import Interrupted, PhasedCptError
from phased_cpt.stopping import Stopping, heard
from tests.launchers.programs import is_gone_soon, pid_of
from tests.nodes.conftest import Nodes, environments

TRAINS, LONG = "train(4)", "train(4000)"
WAITS = "waiting for its orders"


def test_three_of_unequal_size_come_in_any_order_and_one_is_called_again(nodes: Nodes, tmp_path: Path) -> None:
    second = nodes.other(2, of=3)
    with nodes.head(of=3) as head:
        second.says(WAITS)
        first = nodes.other(1, of=3)
        first.says(WAITS)
        second.running.kill()
        while not head.others[2].wire.lost():  # its connection is closed by the kernel
            time.sleep(0.02)
        again = nodes.other(2, of=3, ranks=2)
        jobs = nodes.jobs(head)
        jobs.run(nodes.program(*[TRAINS] * 4), Stopping())
        found = environments(tmp_path, 4)
    assert (first.ends()[0], again.ends()[0]) == (0, 0)
    assert [(each["LOCAL_RANK"], each["LOCAL_SIZE"], each["WORLD_SIZE"]) for each in found] == [
        ("0", "1", "4"), ("0", "1", "4"), ("0", "2", "4"), ("1", "2", "4"),
    ]  # fmt: skip


def test_one_that_leaves_while_others_are_waited_for_is_waited_for_again(nodes: Nodes) -> None:
    first = nodes.other(1, of=3)

    def leave() -> None:
        first.says(WAITS)
        first.running.send_signal(signal.SIGINT)
        while "node 1 (node1) has left again" not in nodes.told:
            time.sleep(0.05)
        nodes.other(1, of=3)
        nodes.other(2, of=3)

    with nodes.head(of=3) as head:
        threading.Thread(target=leave, daemon=True).start()
        assert nodes.jobs(head).ranks == 3
    assert first.ends()[0] == 75


def test_between_two_phases_a_node_may_be_called_again_if_it_is_as_large(nodes: Nodes, tmp_path: Path) -> None:
    other = nodes.other()
    with nodes.head() as head:
        jobs = nodes.jobs(head)
        jobs.run(nodes.program(TRAINS, TRAINS), Stopping())
        other.running.kill()
        other.running.wait()
        larger = nodes.other(ranks=2)
        code, said = larger.ends()
        assert (code, "has come back with 2 ranks, and had 1" in said) == (2, True)
        again = nodes.other()
        threading.Event().wait(0.1)
        while said.count(WAITS) < 2:  # of the first, and of this one
            time.sleep(0.05)
            said = again.log.read_text()
        jobs.run(nodes.program("say('went on-0')", "say('went on-1')"), Stopping())
        assert (tmp_path / "went on-1").exists()
    assert again.ends()[0] == 0


# Stops ----------------------------------------------------------------------------------------------------------------


def test_a_stop_of_one_that_waits_stops_all_before_the_next_phase(nodes: Nodes) -> None:
    other = nodes.other()
    with pytest.raises(Interrupted, match=r"node 1 \(node1\) was stopped \(SIGTERM\)"), nodes.head() as head:
        jobs = nodes.jobs(head)
        other.says(WAITS)
        other.running.send_signal(signal.SIGTERM)
        assert other.ends()[0] == 75
        jobs.run(nodes.program(LONG, LONG), Stopping())


def test_a_stop_of_node_0_while_the_others_wait_is_their_stop(nodes: Nodes) -> None:
    other = nodes.other()
    with pytest.raises(Interrupted, match="Ctrl-C"), heard() as stop, nodes.head() as head:
        nodes.jobs(head, stop)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # it prepares data
    code, said = other.ends()
    assert (code, "node 0 has ended the run: it was stopped" in said) == (75, True)


def test_a_stop_before_ranks_train_is_a_stop_of_all(nodes: Nodes, tmp_path: Path) -> None:
    imports = "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(60)"  # and have no pulse
    other = nodes.other()
    with pytest.raises(Interrupted), nodes.head() as head:
        jobs = nodes.jobs(head)
        program = nodes.program(imports, imports)
        Path(nodes.folder / "tells").touch()

        def tell() -> None:
            pid_of(tmp_path / "began-1")
            other.running.send_signal(signal.SIGTERM)

        threading.Thread(target=tell, daemon=True).start()
        jobs.run(program, Stopping())
    assert other.ends()[0] == 75


def test_a_second_signal_elsewhere_ends_all_at_once_and_is_a_stop_still(nodes: Nodes, tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); train(4000)"
    follows = "wait('began-1'); train(4000)"
    other = nodes.other()

    def tell() -> None:
        pid_of(tmp_path / "began-0"), pid_of(tmp_path / "began-1")
        time.sleep(0.5)
        other.running.send_signal(signal.SIGTERM)
        time.sleep(1.3)
        other.running.send_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"node 1 \(node1\) was stopped \(SIGTERM\)"), nodes.head() as head:
        jobs = nodes.jobs(head)
        threading.Thread(target=tell, daemon=True).start()
        jobs.run(nodes.program(follows, deaf), Stopping())
    assert other.ends()[0] == 75
    assert is_gone_soon(pid_of(tmp_path / "began-0"))


# Of those who fail at once, who is told of ----------------------------------------------------------------------------


def test_a_node_that_is_gone_counts_for_more_than_the_connections_that_broke_because_of_it(
    nodes: Nodes, tmp_path: Path
) -> None:
    other = nodes.other()
    follows = "wait('gone'); word(1, 'connection closed by peer'); os._exit(1)"

    def kill() -> None:
        pid_of(tmp_path / "began-1")
        (tmp_path / "gone").touch()
        time.sleep(0.3)
        other.running.kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(PhasedCptError, match=r"^node 1 \(node1\) is gone"), nodes.head() as head:
        nodes.jobs(head).run(nodes.program(follows, LONG), Stopping())
