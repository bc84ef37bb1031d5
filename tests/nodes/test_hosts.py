"""A file of machines: what is wrong with it is told by line; the others are called by ssh, which here is a program of ours."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from phased_cpt.children import command
from phased_cpt.errors import InputError, Interrupted
from phased_cpt.nodes.hosts import Host, call_words, called, read_hostfile, require_here
from phased_cpt.stopping import LEAVING_SECONDS, heard
from tests.conftest import Write
from tests.launchers.programs import is_alive, is_gone_soon, pid_of
from tests.nodes.conftest import Nodes


def test_a_file_as_deepspeed_reads_it(write: Write) -> None:
    path = write("# the cluster\nworker-1 slots=8\n\n10.0.0.2   slots=4 # the old one\n", "hosts")
    assert read_hostfile(path) == [Host("worker-1", 8), Host("10.0.0.2", 4)]


@pytest.mark.fault("F33", "a wrong hostfile", "each line of it named, exit 2")
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("worker-1\n", "hosts:1: 'worker-1'; a name and its number of GPUs are needed: worker-1 slots=8"),
        ("worker-1 slots=0\n", "hosts:1: 'worker-1 slots=0'; a name and its number of GPUs are needed"),
        ("a slots=1\nb slots=two\n", "hosts:2: 'b slots=two'; a name"),
        ("a slots=1\na slots=2\n", "hosts:2: a stands twice; one line a machine"),
        ("# none\n", "hosts: no machine is named; write a line for each"),
    ],
)
def test_what_is_wrong_with_it_is_told(text: str, told: str, write: Write) -> None:
    with pytest.raises(InputError) as refused:
        read_hostfile(write(text, "hosts"))
    assert told in str(refused.value)


def test_all_that_is_wrong_is_told_at_once(write: Write) -> None:
    with pytest.raises(InputError) as refused:
        read_hostfile(write("a\nb\nc slots=1\n", "hosts"))
    assert len(str(refused.value).splitlines()) == 2


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(InputError, match=r"launch.hostfile: no-such-file cannot be read: No such file or directory"):
        read_hostfile(Path("no-such-file"))


@pytest.mark.fault("F33", "a hostfile whose first machine is another one", "named, exit 2")
def test_the_first_machine_is_this_one() -> None:
    for here in (socket.gethostname(), "127.0.0.1"):
        require_here([Host(here, 1), Host("other", 1)], Path("hosts"))  # the control
    require_here([Host("localhost", 1)], Path("hosts"))
    with pytest.raises(
        InputError, match=r"hosts: the first machine is 192.0.2.7, and this is .*; call the command there"
    ):
        require_here([Host("192.0.2.7", 1), Host(socket.gethostname(), 1)], Path("hosts"))
    with pytest.raises(InputError, match=r"localhost is first, and the others must find it: write its name or address"):
        require_here([Host("localhost", 1), Host("other", 1)], Path("hosts"))


def test_the_words_of_a_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Golden: the same folder and Python; what libraries are told goes along, and no key ever does."""
    here = tmp_path / "a folder; with 'marks'"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in [name for name in os.environ if name != "HOME"]:
        monkeypatch.delenv(name)
    kept = {"NCCL_DEBUG": "INFO", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
    for name, value in {**kept, "HF_TOKEN": "hf_secret", "WANDB_API_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    words = call_words(Host("worker-2", 4), 1, ["run", "-c", "my run.yaml", "--nnodes", "2"])
    python = " ".join(f"'{word}'" if " " in word else word for word in command("phased_cpt"))
    assert words == [
        "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "worker-2",
        f"cd '{tmp_path}/a folder; with '\"'\"'marks'\"'\"'' && exec env HF_HUB_OFFLINE=1 NCCL_DEBUG=INFO PATH=/usr/bin "
        f"PHASED_CPT_CALLED_BY_NODE_0=1 {python} run -c 'my run.yaml' --nnodes 2 --node-rank 1 --set launch.num_gpus=4",
    ]  # fmt: skip


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of ssh; its text is written by the test."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "bin" / "ssh"


def say(ssh: Path, text: str) -> None:
    ssh.write_text(f"#!/bin/sh\n{text}\n")
    ssh.chmod(0o755)


def test_all_but_the_first_are_called(ssh: Path, tmp_path: Path) -> None:
    say(ssh, f'echo "$5" >> "{tmp_path}/called"')
    with called([Host("a", 1), Host("b", 2), Host("c", 4)], ["run"]) as others:
        assert [each.host.name for each in others] == ["b", "c"]
        for each in others:
            each.process.wait(10)
    assert sorted((tmp_path / "called").read_text().split()) == ["b", "c"]


@pytest.mark.fault("F33", "a machine that ssh cannot reach", "named, with what ssh says")
def test_one_that_cannot_be_reached_is_told_in_the_words_of_ssh(ssh: Path) -> None:
    say(ssh, "echo 'ssh: connect to host b port 22: Connection refused' >&2; exit 255")
    with called([Host("a", 1), Host("b", 1)], ["run"]) as (other,):
        other.process.wait(10)
        assert other.ended() == "`ssh b` ended with 255: ssh: connect to host b port 22: Connection refused"


def test_without_ssh_the_other_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    told = r"there is no ssh here; install it, or call the command on each node"
    with pytest.raises(InputError, match=told), called([Host("a", 1), Host("b", 1)], ["run"]):
        pass


CONNECT = "ssh: connect to host b port 22: No route to host"


@pytest.mark.parametrize(
    ("does", "told"),
    [
        (f"echo '{CONNECT}' >&2; exit 255", f"`ssh b` ended with 255: {CONNECT}"),
        ("echo 'sh: 1: exec: python: not found' >&2; exit 127", "ended with 127: sh: 1: exec: python: not found"),
        ("echo 'b: Permission denied (publickey,password).' >&2; exit 255", "ended with 255: b: Permission denied"),
    ],
)
@pytest.mark.fault(
    "F33", "a machine that ssh cannot reach, or that lacks the program", "named, with what is said there"
)
def test_node_0_tells_why_one_never_comes_and_those_that_it_has_called_look_for_it_no_more(
    does: str, told: str, ssh: Path, tmp_path: Path, nodes: Nodes, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other looks at a port where nobody listens; nothing but node 0, which goes, can tell it so."""
    looks = f"from phased_cpt.nodes.attendant import *; import os; open('{tmp_path}/pid', 'w').write(str(os.getpid()))"
    looks += f"; heard().__enter__(); reached('127.0.0.1', {nodes.port}, 'node 2', Stopping(), print)"
    (tmp_path / "looks.py").write_text(looks)
    say(
        ssh,
        f'[ "$5" = b ] && {{ {does}; }}\nPHASED_CPT_CALLED_BY_NODE_0=1 PYTHONUNBUFFERED=1 "{sys.executable}" "{tmp_path}/looks.py"',
    )
    with called([Host("a", 1), Host("b", 1), Host("c", 1)], ["run"]) as (b, c):
        b.process.wait(10)
        assert told in str(b.ended())
        pid = pid_of(tmp_path / "pid")
        assert c.ended() is None
    assert is_gone_soon(pid)
    said = capfd.readouterr().err
    assert "c: node 2: looking for node 0" in said
    assert "node 0 has called this machine, and is gone" in said


def test_a_call_that_hangs_is_ended_before_a_stop_is_out_of_patience(ssh: Path, tmp_path: Path) -> None:
    say(ssh, f"trap '' TERM; echo $$ > {tmp_path}/$5; exec sleep 60")
    machines = [Host(name, 1) for name in "abcdef"]
    with pytest.raises(Interrupted), heard(), called(machines, ["run"]) as others:
        assert all(is_alive(pid_of(tmp_path / other.host.name)) for other in others)
        assert [other.ended() for other in others] == [None] * 5
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert time.monotonic() - began < LEAVING_SECONDS
    assert all(other.ended() == f"`ssh {other.host.name}` ended with -9" for other in others)
