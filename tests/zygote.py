"""Ranks in a second: a process that has imported everything, and forks ranks which run what they are told.

pytest (no torch) ─ a line of JSON ─→ zygote (torch, transformers, deepspeed) ─ fork ─→ rank 0, rank 1, …
                  ←─ exit codes ────                                          result of rank 0 in a file

A launched job takes ten seconds here, nearly all of them imports; this takes one. It does not test the launchers.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phased_cpt.job import Job
from phased_cpt.launchers import Environment, Place, free_port, shared
from phased_cpt.launchers.failures import failure_of
from phased_cpt.stopping import Stopping

REPOSITORY = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 10.0  # between asking and making
DEADLINE_SECONDS = 240.0  # a hang must not eat the whole of CI


class Zygote:
    """The process, seen from pytest."""

    def __init__(self) -> None:
        environment = {**os.environ, **shared(Place.alone(2)), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"], env=environment, cwd=REPOSITORY,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ranks(
        self, program: str, arguments: list[Any], ranks: int, logs: Path, patience: float = 0.3, **environment: str
    ) -> list[int]:
        """Run module:function in so many ranks; returns their exit codes. After a failure the others have so long."""
        logs.mkdir(parents=True, exist_ok=True)
        order = {
            "program": program,
            "arguments": arguments,
            "ranks": ranks,
            "logs": str(logs.resolve()),
            "more": environment,
            "patience": patience,
        }
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(order | {"cwd": str(Path.cwd())}) + "\n")
        self._process.stdin.flush()
        codes: list[int] = json.loads(self._process.stdout.readline())
        return codes

    def call(self, program: str, *arguments: Any, ranks: int = 1, folder: Path) -> Any:
        """What module:function returns in rank 0."""
        result = folder / "result.json"
        result.unlink(missing_ok=True)
        codes = self.ranks("tests.zygote:_keep", [program, list(arguments), str(result)], ranks, folder)
        assert not any(codes), "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank*.log")))
        return json.loads(result.read_text())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


@dataclass(frozen=True)
class ForkedJobs:
    """The first door, without the imports."""

    zygote: Zygote
    ranks: int = 2
    program: str = "phased_cpt.worker:main"
    first: tuple[Any, ...] = ()  # arguments of a program of the test's own, before those of the worker
    starts_again: bool = True

    def train(self, job: Job, stop: Stopping) -> None:
        path = job.path
        logs = path.parent / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for left in logs.glob("failed-*.json"):
            left.unlink()
        codes = self.zygote.ranks(self.program, [*self.first, [str(path)]], self.ranks, logs)
        if any(codes):
            failed = next(at for at, code in enumerate(codes) if code not in (0, -signal.SIGTERM))
            raise failure_of(f"rank {failed}", codes[failed], logs, logs / f"rank{failed}.log")


# In the zygote ---------------------------------------------------------------------------------------------------------


def _keep(program: str, arguments: list[Any], result: str) -> None:
    found = _function(program)(*arguments)
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(found))


def shell(arguments: list[str]) -> None:
    """`deepspeed --module phased_cpt …`, as one of its ranks."""
    from phased_cpt.__main__ import main

    sys.argv = ["phased-cpt", f"--local_rank={os.environ['RANK']}", *arguments]
    main()


def _function(program: str) -> Any:
    module, _, name = program.partition(":")
    return getattr(importlib.import_module(module), name)


def _rank(order: dict[str, Any], rank: int, environment: Environment) -> None:
    """A forked child, which never returns."""
    code = 1
    try:
        os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | order["more"]
        log = os.open(f"{order['logs']}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(order["cwd"])
        _function(order["program"])(*order["arguments"])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(order: dict[str, Any]) -> list[int]:
    ranks = order["ranks"]
    environment = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _rank(order, rank, environment)
        children.append(child)
    return _codes(children, order["patience"])


def _codes(children: list[int], patience: float) -> list[int]:
    """As a launcher does: when one fails, or nothing moves any more, the others are ended."""
    codes: dict[int, int] = {}
    deadline, failed = time.monotonic() + DEADLINE_SECONDS, False
    while len(codes) < len(children):
        for child in (child for child in children if child not in codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and not failed:
            deadline, failed = time.monotonic() + patience, True  # the others may have something to say
        if time.monotonic() > deadline:
            for child in (child for child in children if child not in codes):
                codes[child] = _ended(child)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _ended(child: int) -> int:
    """Asked, and made to."""
    os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    gc.disable()
    for module in ("phased_cpt.ranks", "phased_cpt.worker"):  # by name, or else ruff takes them out as unused
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        codes = _run(json.loads(line))
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
