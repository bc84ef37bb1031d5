"""What else calls at the port of the nodes, or listens there, is sent away, or told; the nodes come all the same."""

import json
import resource
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.nodes import attend, identity_of
from tests.nodes.conftest import HERE, Nodes

CONNECTS = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(int(sys.argv[2]))]
print("connected", flush=True)
sys.stdin.read()
"""


def hello(**differs: Any) -> bytes:
    said = {"node": 1, "of": 2, "ranks": 1, "identity": identity_of(None).facts()} | differs
    return json.dumps({"hello": said}).encode() + b"\n"


def answer(port: int, said: bytes) -> bytes:
    """All that node 0 says until it closes."""
    with socket.create_connection((HERE, port)) as connection:
        connection.settimeout(5)
        try:
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b""))
        except (BrokenPipeError, ConnectionResetError):  # it did not want to hear all of it
            return b""


def test_what_is_no_hello_is_sent_away_and_the_nodes_come(nodes: Nodes, capfd: pytest.CaptureFixture[str]) -> None:
    no_nodes = [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"hello": {"node"',
        b"[1]\n",
        b"5\n",
        b"[" * 100_000 + b"\n",
        b'{"hel": 1}\n',
        b"\xff\xfe\n",
        b"x" * 2**25,
    ]
    other_versions = [
        hello(node="1"),
        hello(node=True),
        hello(ranks=0),
        hello(ranks=-1),
        hello(of=None),
        hello(identity={"host": "a"}),
        hello(identity=[]),
        hello(identity={"host": 1, "code": {}, "settings": {}}),
        b'{"hello": 7}\n',
    ]
    with nodes.head() as head:
        assert [answer(nodes.port, said) for said in no_nodes] == [b""] * len(no_nodes)
        for said in other_versions:
            assert b"node 0 (node0) has not understood" in answer(nodes.port, said), said
        nodes.other()
        assert nodes.jobs(head).ranks == 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_node_that_says_nothing_of_its_code_is_refused(nodes: Nodes) -> None:
    with nodes.head() as head:
        said = hello(identity={"host": "node1", "code": {}, "settings": {}})
        assert b"deepspeed is" in answer(nodes.port, said)
        with pytest.raises(InputError, match="would not do the same"):
            nodes.jobs(head)


def test_so_many_connections_that_no_more_can_be_opened_keep_nobody_away_for_long(nodes: Nodes) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with nodes.head() as head:
        lowest = socket.socket()
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 16, before[1]))
        lowest.close()
        crowd = [sys.executable, "-c", CONNECTS, str(nodes.port), "40"]
        try:
            with subprocess.Popen(crowd, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as connecting:
                assert connecting.stdout is not None
                assert connecting.stdout.readline() == b"connected\n"
                time.sleep(0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        nodes.other()
        assert nodes.jobs(head).ranks == 2


def test_another_program_in_the_place_of_node_0_is_told_as_that(nodes: Nodes) -> None:
    def answers(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        connection.close()

    with socket.create_server((HERE, nodes.port)) as listener:
        threading.Thread(target=answers, args=[listener], daemon=True).start()
        told = rf"^{HERE}:{nodes.port} does not answer as node 0 does: .*; is another program there\? Give another"
        with pytest.raises(PhasedCptError, match=told):
            attend(HERE, nodes.port, 1, 2, 1, replace(identity_of(None), host="node1"), nodes.told.append)


def test_a_name_that_means_no_more_than_this_machine_to_itself_is_told(nodes: Nodes) -> None:
    with pytest.raises(InputError, match=r"launch.master_addr: 127.1 means 127.0.0.1 on this machine, where no other"):
        nodes.head(address="127.1")
    with nodes.head(address=HERE):
        pass  # the control: who writes the address means it


def test_another_run_of_the_same_nodes_is_told_to_take_another_port(nodes: Nodes) -> None:
    nodes.other()
    with nodes.head() as head:
        nodes.jobs(head)
        said = answer(nodes.port, hello()).decode()
        assert "node0 is node 0 of a run under way, with node 1 (node1); another needs another --master-port" in said
        head.require_all()  # the control: it goes on
