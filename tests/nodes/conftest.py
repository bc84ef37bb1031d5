"""Two nodes on one machine: node 0 in the test, node 1 in a process of its own, which they know by its name."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.doors import LaunchedJobs
from phased_cpt.launchers import Program, free_port
from phased_cpt.nodes import Head, Identity, identity_of
from phased_cpt.stopping import Stopping
from tests.conftest import REPOSITORY

HERE = "127.0.0.1"
OTHER = """
import json, sys
from phased_cpt.nodes import Identity, attend, attendant
from phased_cpt.errors import PhasedCptError
port, node, of, ranks, identity = json.loads(sys.argv[1])
attendant.SEEN_SECONDS = 2.0  # there is no NFS between processes
try:
    code = attend("127.0.0.1", port, node, of, ranks, Identity(**identity), lambda said: print(said, flush=True))
except PhasedCptError as error:
    print(error, flush=True)
    code = error.exit_code
sys.exit(code)
"""


class Other:
    """Another node."""

    def __init__(self, folder: Path, port: int, node: int, of: int, identity: Identity, ranks: int = 1) -> None:
        self.log = folder / f"node{node}.log"
        arguments = json.dumps([port, node, of, ranks, identity.facts()])
        with self.log.open("a") as log:
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
            self.running = subprocess.Popen(
                [sys.executable, "-c", OTHER, arguments], stdout=log, stderr=log, env=environment, cwd=folder
            )

    def ends(self) -> tuple[int, str]:
        """Its exit code, and all that it has said."""
        return self.running.wait(30), self.log.read_text()

    def says(self, words: str) -> None:
        deadline = time.monotonic() + 30
        while words not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)


class Nodes:
    """Of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        (folder / "logs").mkdir()
        self.told: list[str] = []
        self._started: list[Other] = []

    def other(self, node: int = 1, of: int = 2, ranks: int = 1, **differs: Any) -> Other:
        identity = replace(identity_of(None), host=f"node{node}", **differs)
        started = Other(self.folder, self.port, node, of, identity, ranks)
        self._started.append(started)
        return started

    def head(
        self, of: int = 2, patience: float = math.inf, address: str = HERE, rehearses: bool = False, **differs: Any
    ) -> Head:
        mine = replace(identity_of(None), host="node0", **differs)
        return Head(address, self.port, of, 1, mine, patience, rehearses=rehearses)

    def jobs(self, head: Head, stop: Stopping | None = None, hang_seconds: float = math.inf) -> LaunchedJobs:
        """Once they have come."""
        head.gather(stop or Stopping(), self.told.append)
        return LaunchedJobs("local", head.ranks, hang_seconds, head)

    def program(self, *ranks: str) -> Program:
        argument = self.folder / "job.json"
        argument.write_text(json.dumps({str(rank): does for rank, does in enumerate(ranks)}))
        return Program("tests.nodes.ranks", argument, self.folder / "logs")

    def close(self) -> None:
        for each in self._started:
            each.running.kill()
            each.running.wait()


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    found = Nodes(tmp_path)
    yield found
    found.close()


def environments(folder: Path, ranks: int) -> Sequence[dict[str, str]]:
    return [json.loads((folder / f"environment-{rank}.json").read_text()) for rank in range(ranks)]
