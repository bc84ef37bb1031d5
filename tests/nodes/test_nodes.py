"""Node 0 and another one: they come, are ordered, stopped, lost, and each of them says what has befallen it."""

import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from phased_cpt.errors import InputError, Interrupted, PhasedCptError
from phased_cpt.nodes import identity_of
from phased_cpt.stopping import Stopping
from tests.launchers.programs import asks, is_alive, is_gone_soon, pid_of
from tests.nodes.conftest import Nodes, environments

TRAINS, LONG = "train(4)", "train(4000)"


def test_the_ranks_of_a_job_run_on_both_and_the_other_leaves_with_node_0(nodes: Nodes, tmp_path: Path) -> None:
    other = nodes.other()
    with nodes.head() as head:
        jobs = nodes.jobs(head)
        assert jobs.ranks == 2
        jobs.run(nodes.program(TRAINS, TRAINS), Stopping())
        jobs.run(nodes.program(TRAINS, TRAINS), Stopping())  # the next phase
        first, second = environments(tmp_path, 2)
    assert other.ends()[0] == 0
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in (first, second)] == [
        ("0", "0", "2"), ("1", "0", "2"),
    ]  # fmt: skip
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert "all 2 nodes are here, 2 ranks: node 0 node0 (1), node 1 node1 (1)" in nodes.told


def test_how_node_0_ends_is_how_the_other_ends(nodes: Nodes) -> None:
    other = nodes.other()
    with pytest.raises(Interrupted), nodes.head() as head:
        nodes.jobs(head)
        raise Interrupted("stopped; the same command goes on")
    code, said = other.ends()
    assert code == 75
    assert "node 0 has ended the run: stopped; the same command goes on" in said


def test_a_rank_that_fails_elsewhere_is_told_with_its_node_and_ends_those_here(nodes: Nodes, tmp_path: Path) -> None:
    other = nodes.other()
    fails = "wait('began-0'); word(5, 'the loss is no number any more'); os._exit(5)"
    with (
        pytest.raises(PhasedCptError, match=r"^node 1 \(node1\): the loss is no number any more$") as failure,
        nodes.head() as head,
    ):
        nodes.jobs(head).run(nodes.program(LONG, fails), Stopping())
    assert failure.value.exit_code == 5
    assert is_gone_soon(pid_of(tmp_path / "began-0"))
    assert other.ends()[0] == 5


def test_a_rank_that_fails_here_ends_those_elsewhere(nodes: Nodes, tmp_path: Path) -> None:
    other = nodes.other()
    fails = "wait('began-1'); word(1, 'no such GPU'); os._exit(1)"
    with pytest.raises(PhasedCptError, match=r"^no such GPU$"), nodes.head() as head:
        nodes.jobs(head).run(nodes.program(fails, LONG), Stopping())
    assert other.ends()[0] == 1
    assert is_gone_soon(pid_of(tmp_path / "began-1"))


def test_of_one_that_was_killed_elsewhere_the_other_only_knows_that_it_is_gone(nodes: Nodes) -> None:
    nodes.other()
    follows = "wait('began-1'); time.sleep(0.3); word(1, 'connection closed by peer'); os._exit(1)"
    killed = "wait('began-0'); time.sleep(0.25); os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(PhasedCptError, match=r"^node 1 \(node1\): rank 1 was ended by SIGKILL"), nodes.head() as head:
        nodes.jobs(head).run(nodes.program(follows, killed), Stopping())


def test_one_of_several_that_was_killed_elsewhere_is_told_though_the_others_there_are_slow_to_end(nodes: Nodes) -> None:
    nodes.other(ranks=2)
    follows = "wait('began-1'); time.sleep(0.5); word(1, 'connection closed by peer'); os._exit(1)"
    killed = "wait('began-0'); wait('began-2'); time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)"
    slow = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('began-2'); time.sleep(60)"
    with pytest.raises(PhasedCptError, match=r"^node 1 \(node1\): rank 1 was ended by SIGKILL"), nodes.head() as head:
        nodes.jobs(head).run(nodes.program(follows, killed, slow), Stopping())


@pytest.mark.parametrize("where", ["node 0", "the other"])
def test_a_stop_on_any_node_is_a_stop_of_all(where: str, nodes: Nodes, tmp_path: Path) -> None:
    other, stop = nodes.other(), Stopping()
    with pytest.raises(Interrupted, match="stopped after this step"), nodes.head() as head:
        jobs = nodes.jobs(head)
        if where == "node 0":
            asks(stop, signal.SIGTERM, tmp_path / "began-0", tmp_path / "began-1")
        else:

            def tell() -> None:
                pid_of(tmp_path / "began-0"), pid_of(tmp_path / "began-1")
                time.sleep(0.3)
                other.running.send_signal(signal.SIGTERM)

            threading.Thread(target=tell, daemon=True).start()
        jobs.run(nodes.program(LONG, LONG), stop)
    assert other.ends()[0] == 75


@pytest.mark.fault("F31", "SIGKILL of the command on another node", "named, all ended, exit 1")
def test_a_node_that_dies_is_named_and_nobody_is_left(nodes: Nodes, tmp_path: Path) -> None:
    other = nodes.other()

    def kill() -> None:
        pid_of(tmp_path / "began-0"), pid_of(tmp_path / "began-1")
        other.running.kill()

    threading.Thread(target=kill, daemon=True).start()
    gone = r"^node 1 \(node1\) is gone: its connection was closed; .* the same command, on all nodes, goes on$"
    with pytest.raises(PhasedCptError, match=gone) as failure, nodes.head() as head:
        nodes.jobs(head).run(nodes.program(LONG, LONG), Stopping())
    assert failure.value.exit_code == 1
    assert is_gone_soon(pid_of(tmp_path / "began-0"))
    assert is_gone_soon(pid_of(tmp_path / "began-1"))


@pytest.mark.fault("F31", "a machine without a sign of life", "named, all ended, exit 1")
def test_a_node_that_gives_no_sign_is_lost(nodes: Nodes, tmp_path: Path) -> None:
    other = nodes.other()

    def freeze() -> None:
        pid_of(tmp_path / "began-0"), pid_of(tmp_path / "began-1")
        other.running.send_signal(signal.SIGSTOP)

    threading.Thread(target=freeze, daemon=True).start()
    with (
        pytest.raises(PhasedCptError, match=r"^node 1 \(node1\) is gone: it has given no sign for \d+ s"),
        nodes.head(patience=8.0) as head,
    ):
        nodes.jobs(head).run(nodes.program(LONG, LONG), Stopping())
    assert is_gone_soon(pid_of(tmp_path / "began-0"))
    other.running.send_signal(signal.SIGCONT)
    assert other.ends()[0] == 1
    assert is_gone_soon(pid_of(tmp_path / "began-1"))


@pytest.mark.fault("F31", "a rank that stands still on another node", "named with its node, all ended, exit 1")
def test_a_rank_that_stands_still_elsewhere_is_the_first_to_be_named(nodes: Nodes, tmp_path: Path) -> None:
    nodes.other()
    still = "beating.beat('training', 7); os.kill(os.getpid(), signal.SIGSTOP)"
    waits = "wait('began-1'); time.sleep(0.2); beating.beat('training', 7); time.sleep(600)"
    with pytest.raises(PhasedCptError) as failure, nodes.head() as head:
        nodes.jobs(head, hang_seconds=3.0).run(nodes.program(waits, still), Stopping())
    said = str(failure.value).splitlines()
    assert "no rank has given a sign" in said[0]
    assert said[1].startswith("    rank 1: on ") and said[1].endswith("stopped by a signal")
    assert said[2].startswith("    rank 0: training, step 7"), "the control: the one that waits comes after it"
    assert is_gone_soon(pid_of(tmp_path / "began-1"))


@pytest.mark.fault("F31", "SIGKILL of node 0", "the ranks elsewhere are ended, exit 1")
def test_when_node_0_dies_nobody_is_left_elsewhere(nodes: Nodes, tmp_path: Path) -> None:
    other, head = nodes.other(), nodes.head()
    jobs = nodes.jobs(head)
    place = head.place()
    (order,) = head.parts(nodes.program(LONG, LONG), "local", place)
    order.start({})
    assert is_alive(pid_of(tmp_path / "began-1"))
    for each in head.others.values():
        each.wire.close()  # without a word
    code, said = other.ends()
    assert code == 1
    assert "node 0 is gone: its connection was closed; the same command, on all nodes, goes on" in said
    assert is_gone_soon(pid_of(tmp_path / "began-1"))
    with pytest.raises(PhasedCptError, match="is gone"):
        jobs.run(nodes.program(LONG, LONG), Stopping())


def test_whoever_has_come_for_the_run_helps_with_the_rehearsal_and_comes_again(nodes: Nodes, tmp_path: Path) -> None:
    other = nodes.other()
    with nodes.head(rehearses=True) as rehearsal:
        nodes.jobs(rehearsal).run(nodes.program("say('rehearsed-0')", "say('rehearsed-1')"), Stopping())
    with nodes.head() as head:
        nodes.jobs(head).run(nodes.program(TRAINS, TRAINS), Stopping())
    assert other.ends()[0] == 0
    assert (tmp_path / "rehearsed-1").exists() and (tmp_path / "began-1").exists()


def test_after_a_rehearsal_that_failed_nobody_comes_again(nodes: Nodes) -> None:
    other = nodes.other()
    failed = PhasedCptError("this run would fail: packages")
    failed.exit_code = 3
    with pytest.raises(PhasedCptError), nodes.head(rehearses=True) as rehearsal:
        nodes.jobs(rehearsal)
        raise failed
    code, said = other.ends()
    assert (code, "this run would fail: packages" in said) == (3, True)


# Before anything is started -------------------------------------------------------------------------------------------


@pytest.mark.fault("F32", "a node with other code", "named, exit 2")
def test_a_node_with_other_code_is_named(nodes: Nodes) -> None:
    other = nodes.other(code=identity_of(None).code | {"deepspeed": "0.17.0", "phased_cpt": "an older checkout"})
    with (
        pytest.raises(
            InputError,
            match=r"node 1 \(node1\) would not do the same as node 0:\n.*deepspeed is 0\.\d+\.\d+ on node0, 0\.17\.0 on node1",
        ),
        nodes.head() as head,
    ):
        nodes.jobs(head)
    code, said = other.ends()
    assert code == 2
    assert "phased_cpt is" in said


@pytest.mark.fault("F32", "a node with another configuration", "named, exit 2")
def test_a_node_with_another_configuration_is_named(nodes: Nodes) -> None:
    nodes.other(settings={"training.learning_rate": 5e-05, "run.seed": 42})
    with (
        pytest.raises(InputError, match=r"\n    training.learning_rate is 0.0001 on node0, 5e-05 on node1\n"),
        nodes.head(settings={"training.learning_rate": 1e-4, "run.seed": 42}) as head,
    ):
        nodes.jobs(head)


def test_nodes_that_were_called_in_contradiction_are_told(nodes: Nodes) -> None:
    nodes.other(of=3)
    with (
        pytest.raises(InputError, match=r"node 1 \(node1\) was called with --nnodes 3, and node 0 with 2"),
        nodes.head() as head,
    ):
        nodes.jobs(head)


def test_two_with_the_same_number_are_told(nodes: Nodes) -> None:
    nodes.other(1, of=3).says("looking for")
    nodes.other(1, of=3)
    with (
        pytest.raises(InputError, match=r"two nodes were called with --node-rank 1: node1 and node1"),
        nodes.head(of=3) as head,
    ):
        nodes.jobs(head)


@pytest.mark.fault("F33", "the port of the nodes is taken", "named, exit 2")
def test_a_port_that_is_taken_is_told(nodes: Nodes) -> None:
    told = rf"127.0.0.1:{nodes.port} is taken by another program; give another with --master-port"
    with socket.create_server(("127.0.0.1", nodes.port)), pytest.raises(InputError, match=told):
        nodes.head()
    with nodes.head():
        pass  # the control: it is free now


def test_an_address_of_another_machine_is_told(nodes: Nodes) -> None:
    with pytest.raises(InputError, match=r"192.0.2.1 is no address of this machine .*, which is node 0; give its own"):
        nodes.head(address="192.0.2.1")
    with pytest.raises(
        InputError, match=r"launch.master_addr: no-such-host.invalid is no name that this machine knows"
    ):
        nodes.head(address="no-such-host.invalid")


def test_whoever_else_calls_at_the_port_is_sent_away(nodes: Nodes) -> None:
    with nodes.head() as head:
        with socket.create_connection(("127.0.0.1", nodes.port)) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert browser.recv(64) == b""
        nodes.other()
        assert nodes.jobs(head).ranks == 2


def test_a_run_folder_that_the_other_does_not_see_is_told(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.other()
    with (
        pytest.raises(PhasedCptError, match=r"node 1 .*job.json of node 0 is not seen .*folder that all nodes share"),
        nodes.head() as head,
    ):
        jobs = nodes.jobs(head)
        program = nodes.program(LONG, LONG)
        (order,) = head.parts(program, "local", head.place())
        order._order["content"] = "of another file"
        monkeypatch.setattr(head, "parts", lambda *_: [order])
        jobs.run(program, Stopping())


def test_a_stop_while_the_others_are_waited_for_is_heard(nodes: Nodes) -> None:
    stop = Stopping()
    threading.Timer(0.5, stop._ask, [signal.SIGINT]).start()
    with nodes.head() as head, pytest.raises(Interrupted, match="Ctrl-C"):
        nodes.jobs(head, stop)
