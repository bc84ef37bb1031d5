"""A run on two machines, which are network namespaces of this one: cut apart in mid-phase, gone on with in another way
each time, and the weights are those of one machine.

root ─ ip netns ─┬─ pcpt-a   10.77.0.1   host nodea
                 └─ pcpt-b   10.77.0.2   host nodeb      the same disk, nothing else in common
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.journeys.conftest import Ran, Tiny
from tests.journeys.runs import all_of

BIN = Path(sys.executable).parent
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
COMMAND = [sys.executable, "-m", "phased_cpt", "run", "-c", "run.json"]
LONG_SECONDS = 150.0


@dataclass
class Hosts:
    """Two of them, and a wire between."""

    names: dict[str, str]
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def words(self, host: str, words: list[str]) -> list[str]:
        """What runs these on one of them, under a name of its own."""
        there = ["sh", "-c", 'hostname "$0" && exec "$@"', f"node{host}"]
        return ["ip", "netns", "exec", self.names[host], "unshare", "--uts", *there, *words]

    def begin(self, host: str, words: list[str]) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        environment["PATH"] = f"{Path.cwd() / 'bin'}:{BIN}:{os.environ['PATH']}"
        with Path(f"{host}.log").open("ab") as log:
            running = subprocess.Popen(self.words(host, words), env=environment, stdout=log, stderr=log)
        self.started.append(running)
        return running

    def cut(self, cut: bool = True) -> None:
        self.ip("-n", self.names["b"], "link", "set", "wire", "down" if cut else "up")

    @staticmethod
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip (iproute2)")
    made = Hosts({host: f"pcpt-{host}-{os.getpid()}" for host in ADDRESSES})
    a, b = made.names.values()
    try:
        made.ip("netns", "add", a)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    try:
        made.ip("netns", "add", b)
        made.ip("link", "add", "wire", "netns", a, "type", "veth", "peer", "name", "wire", "netns", b)
        for host, address in ADDRESSES.items():
            made.ip("-n", made.names[host], "addr", "add", f"{address}/24", "dev", "wire")
            for link in ("lo", "wire"):
                made.ip("-n", made.names[host], "link", "set", link, "up")
        yield made
    finally:
        for running in made.started:
            running.kill()
            running.wait()
        for name in made.names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def nodes(host: str) -> list[str]:
    """The options of a call on each of two."""
    return ["--nnodes", "2", "--node-rank", str(list(ADDRESSES).index(host)), "--master-addr", ADDRESSES["a"]]


def log(host: str) -> str:
    return Path(f"{host}.log").read_text()


def wait_for(path: Path, lines: int) -> None:
    deadline = time.monotonic() + LONG_SECONDS
    while not (path.exists() and len(path.read_text().splitlines()) >= lines):
        assert time.monotonic() < deadline, f"{path} has no {lines} lines\n{log('a')[-3000:]}\n{log('b')[-3000:]}"
        time.sleep(0.05)


def codes(*running: "subprocess.Popen[bytes]") -> list[int]:
    return [each.wait(LONG_SECONDS) for each in running]


@pytest.fixture
def curriculum(tiny: Tiny) -> dict[str, Any]:
    """Two phases on two ranks; the first is long enough to be cut apart."""
    config = tiny(launch={"hang_minutes": 0.4}, checkpoint={"every_steps": 2}, evaluation={"every_steps": 20})
    first, second, _ = config["phases"]
    return config | {"phases": [first | {"max_steps": 60}, second]}


@pytest.mark.requirement("P-05", "P-06")
@pytest.mark.fault("F31", "two hosts (network namespaces), the wire between them cut in a step", "named on both, exit 1, nobody left; exact (E)")  # fmt: skip
def test_cut_apart_and_gone_on_with_by_file_and_by_torchrun_it_has_the_weights_of_one_machine(
    hosts: Hosts, curriculum: dict[str, Any], ran: Ran
) -> None:
    Path("run.json").write_text(json.dumps(curriculum))

    # Called on each, and cut apart.
    calls = [hosts.begin(host, [*COMMAND, *nodes(host)]) for host in "ab"]
    wait_for(Path("run/phase1_foundation/logs/train.jsonl"), 5)
    hosts.cut()
    assert codes(*calls) == [1, 1], log("a")
    assert "node 1 (nodeb) is gone: it has given no sign for" in log("a")
    assert "node 0 is gone" in log("b")
    assert all("Traceback" not in log(host) for host in "ab"), log("a")
    done = len(Path("run/phase1_foundation/logs/train.jsonl").read_text().splitlines())
    assert 5 <= done < 60, "the control: it was cut in mid-phase"
    hosts.cut(False)

    # Called on one, which calls the other, through DeepSpeed's launcher: to the end of the first phase.
    Path("hosts").write_text(f"{ADDRESSES['a']} slots=1\n{ADDRESSES['b']} slots=1\n")
    Path("bin").mkdir()
    ssh = Path("bin/ssh")
    ssh.write_text(
        f"#!/bin/sh\n# -o … -o … host command\nexec ip netns exec {hosts.names['b']} unshare --uts "
        'sh -c \'hostname nodeb && exec sh -c "$0"\' "$6"\n'
    )
    ssh.chmod(0o755)
    more = ["--hostfile", "hosts", "--launcher", "deepspeed", "--until", "foundation"]
    assert codes(hosts.begin("a", [*COMMAND, *more])) == [0], log("a")[-5000:]
    assert "going on after step" in log("a")
    assert "all 2 nodes are here, 2 ranks: node 0 nodea (1), node 1 nodeb (1)" in log("a")

    # The second door, by torchrun on each.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = [f"--master-addr={ADDRESSES['a']}", "--master-port=29511"]
    second = ["-m", "phased_cpt", "-c", "run.json"]
    calls = [hosts.begin(host, [*torchrun, f"--node-rank={at}", *meeting, *second]) for at, host in enumerate("ab")]
    assert codes(*calls) == [0, 0], log("a")[-5000:]

    wanted = curriculum | {"run": {**curriculum["run"], "dir": "alone"}}
    ran(wanted)
    alone, run = all_of(Path("alone")), all_of(Path("run"))
    assert run["weights"] == alone["weights"]
    assert run["steps"] == alone["steps"]
    assert len(run["weights"]) == 2


@pytest.mark.requirement("P-03")
def test_preflight_hears_the_ranks_of_both(hosts: Hosts, curriculum: dict[str, Any]) -> None:
    Path("run.json").write_text(json.dumps(curriculum))
    look = [sys.executable, "-m", "phased_cpt", "preflight", "-c", "run.json"]
    assert codes(*[hosts.begin(host, [*look, *nodes(host)]) for host in "ab"]) == [0, 0], log("a")
    assert re.search(r"collective +2 ranks on nodea, nodeb over gloo: [\d.]+ GB/s", log("a")), log("a")
    assert "node 0 is nodea" in log("b")
    assert not Path("run").exists() and not list(Path().glob(".phased-cpt-ring*")), "nothing is left"


@pytest.mark.requirement("P-08")
def test_sigterm_on_one_machine_seals_a_checkpoint_on_both_and_ends_both_with_75(
    hosts: Hosts, curriculum: dict[str, Any]
) -> None:
    Path("run.json").write_text(json.dumps(curriculum))
    calls = [hosts.begin(host, [*COMMAND, *nodes(host)]) for host in "ab"]
    wait_for(Path("run/phase1_foundation/logs/train.jsonl"), 3)
    calls[1].send_signal(signal.SIGTERM)
    assert codes(*calls) == [75, 75], log("a") + log("b")
    assert list(Path("run/phase1_foundation/checkpoints").glob("checkpoint-*"))
