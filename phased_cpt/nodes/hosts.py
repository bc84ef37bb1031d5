"""The machines of a run by a file, as DeepSpeed's own launcher reads it; all but the first are called by ssh.

worker-1 slots=8        ← here the command is called
worker-2 slots=8
"""

import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phased_cpt.children import command
from phased_cpt.errors import InputError, Interrupted
from phased_cpt.stopping import Asked

LINE = re.compile(r"^(?P<name>[^\s=-][^\s=]*)\s+slots=(?P<slots>[1-9]\d*)$")
# What libraries are told by the environment goes with the call, as DeepSpeed does it; never a key, which ps would show.
PASSED_ON = re.compile(r"^(NCCL_|GLOO_|HF_HOME$|HF_HUB_|TORCH_|OMP_NUM_THREADS$|PYTHONPATH$|PATH$|LD_LIBRARY_PATH$)")
BATCH = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]  # never a question: nobody would see it
LEAVING_SECONDS = 10.0
STOPPED_SECONDS = 1.5  # the same after a Ctrl-C, which waits for nobody long (stopping.py)
ENDING_SECONDS = 0.4
CALLED = "PHASED_CPT_CALLED_BY_NODE_0"  # whose end of our standard input is closed when it goes


@dataclass(frozen=True)
class Host:
    """A line of the file."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """All that is wrong with it is told at once."""
    try:
        lines = path.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"launch.hostfile: {path} cannot be read: {reason}") from None
    hosts: list[Host] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = LINE.match(text)
        if found is None:
            wrong.append(f"{path}:{number}: {text!r}; a name and its number of GPUs are needed: worker-1 slots=8")
        elif found["name"] in [host.name for host in hosts]:
            wrong.append(f"{path}:{number}: {found['name']} stands twice; one line a machine")
        else:
            hosts.append(Host(found["name"], int(found["slots"])))
    if not hosts and not wrong:
        wrong.append(f"{path}: no machine is named; write a line for each: worker-1 slots=8")
    if wrong:
        raise InputError("\n".join(wrong))
    return hosts


def require_here(hosts: Sequence[Host], path: Path) -> None:
    """The first line is the machine that conducts, and so the one that is asked."""
    first = hosts[0].name
    if first in ("localhost", socket.gethostname(), socket.getfqdn()) or _is_own(first):
        if len(hosts) > 1 and first == "localhost":
            raise InputError(f"{path}: localhost is first, and the others must find it: write its name or address")
        return
    what = f"the first machine is {first}, and this is {socket.gethostname()}"
    raise InputError(f"{path}: {what}; call the command there, or put this machine first")


def _is_own(name: str) -> bool:
    """Whether a socket of this machine can have the address that the name stands for."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.bind(where)
    except OSError:
        return False
    return True


class Called:
    """The command on another machine; what it says is said here, too: nobody else hears it."""

    def __init__(self, host: Host, words: list[str]) -> None:
        self.host, self._last = host, ""
        self.process = subprocess.Popen(  # noqa: S603
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._listening = threading.Thread(target=self._listen, name="ssh", daemon=True)
        self._listening.start()

    def ended(self) -> str | None:
        """What is to be told of one that ended before it has come."""
        if (code := self.process.poll()) is None:
            return None
        self.said_all()
        return f"`ssh {self.host.name}` ended with {code}" + (f": {self._last}" if self._last else "")

    def hang_up(self) -> None:
        """One that looks for node 0 still looks for it no more."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def said_all(self) -> None:
        """Wait for its last words."""
        self._listening.join(ENDING_SECONDS)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip()
            self._last = text or self._last
            with contextlib.suppress(OSError):  # nobody reads here any more
                sys.stderr.write(f"{self.host.name}: {text}\n")


def has_hung_up() -> bool:
    """Whether node 0 is gone, which has called this one by ssh."""
    return CALLED in os.environ and bool(select.select([0], [], [], 0)[0])


@contextmanager
def called(hosts: Sequence[Host], words: Sequence[str]) -> Iterator[list[Called]]:
    """The others, called by ssh, each with its place among them; they leave when node 0 does."""
    if shutil.which("ssh") is None:
        mend = "install it, or call the command on each node with --node-rank"
        raise InputError(f"launch.hostfile: there is no ssh here; {mend}")
    running: list[Called] = []
    seconds = LEAVING_SECONDS
    try:
        for node, host in enumerate(hosts):
            if node:
                running.append(Called(host, call_words(host, node, words)))
        yield running
    except (Asked, Interrupted):
        seconds = STOPPED_SECONDS
        raise
    finally:
        _left(running, seconds)


def _left(running: Sequence[Called], seconds: float) -> None:
    """By themselves, as node 0 does; or else they are ended."""
    for each in running:
        each.hang_up()
    _wait(running, seconds)
    for how in (signal.SIGTERM, signal.SIGKILL):
        for each in running:
            each.process.send_signal(how)  # which is nothing where it has ended
        _wait(running, ENDING_SECONDS)


def _wait(running: Sequence[Called], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for each in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            each.process.wait(max(0.0, deadline - time.monotonic()))
            each.said_all()


def call_words(host: Host, node: int, words: Sequence[str]) -> list[str]:
    """In the same folder, with the same Python: both are shared, as the run folder is."""
    passed_on = [f"{name}={value}" for name, value in sorted(os.environ.items()) if PASSED_ON.match(name)]
    place = ["--node-rank", str(node), "--set", f"launch.num_gpus={host.slots}"]
    there = ["env", *passed_on, f"{CALLED}=1", *command("phased_cpt"), *words, *place]
    return ["ssh", *BATCH, host.name, f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(there)}"]
