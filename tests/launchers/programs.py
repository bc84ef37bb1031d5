"""Small programs in the place of ranks and launchers, and a look at whether they live."""

import sys
import threading
import time
from pathlib import Path

from phased_cpt.launchers import Command
from phased_cpt.stopping import Stopping
from tests.conftest import REPOSITORY

# Each says its process id, and then …
SLEEPS = "sleep(60)"
ENDS_WELL = "pass"
FAILS = "sys.exit('no such GPU')"
IS_KILLED = "wait('other'); os.kill(os.getpid(), signal.SIGKILL)"
IGNORES_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('other'); sleep(60)"
HAS_A_RANK = (
    "subprocess.Popen([sys.executable, '-Sc', 'import time; time.sleep(60)']); os.kill(os.getpid(), signal.SIGKILL)"
)

PROGRAM = """
import json, os, signal, subprocess, sys
from pathlib import Path
from time import sleep
sys.path.insert(0, {repository!r})
here, logs = Path({here!r}), Path({logs!r})
def say(name): (here / name).write_text(str(os.getpid()))
def wait(name):
    while not (here / name).exists(): sleep(0.01)
def word(rank, code, message, **more):
    beside = logs / f".{{rank}}"
    beside.write_text(json.dumps(dict(exit_code=code, message=message, rank=rank, **more)))
    beside.rename(logs / f"failed-{{rank}}.json")
def train(rank, code=75, says="stopped after step 7", beats=True):
    "Until it is told to stop; each signal is one letter more in a file."
    from phased_cpt.pulse import Beating
    told = []
    def heard(number, frame):
        told.append(number)
        with open(here / f"heard-{{rank}}", "a") as file: file.write(signal.Signals(number).name + " ")
    signal.signal(signal.SIGTERM, heard); signal.signal(signal.SIGUSR1, heard)
    beating = Beating(logs, rank)
    say(f"trains-{{rank}}")
    while signal.SIGTERM not in told:
        if beats: beating.beat("training", 7)
        sleep(0.02)
    sleep(0.3)
    if code: word(rank, code, says); os._exit(code)
say({name!r})
{does}
"""


class Jobs:
    """Jobs whose ranks do what is said, in a folder."""

    def __init__(self, here: Path) -> None:
        self.here, self.logs = here, here / "logs"

    def __call__(self, *what: str) -> list[Command]:
        """The first writes where we do, as ever."""
        return [
            Command(
                f"rank {rank}", self.words(f"{rank}.pid", does), log=self.logs / f"rank{rank}.log" if rank else None
            )
            for rank, does in enumerate(what)
        ]

    def words(self, name: str, does: str, *more: str) -> list[str]:
        text = PROGRAM.format(
            repository=str(REPOSITORY), here=str(self.here), logs=str(self.logs), name=name, does=does
        )
        return [sys.executable, "-Sc", text, *more]

    def launcher(self, *ranks: str, session: bool = False) -> Command:
        """As launch.py: SIGTERM ends it and its ranks; else it leaves with the first of them that fails."""
        words = [self.words(f"{rank}.pid", does) for rank, does in enumerate(ranks)]
        return Command("the launcher", self.words("launcher.pid", LAUNCHER.format(words=words, session=session)))


LAUNCHER = """
def ends(number, frame):
    say("launcher was told")
    for rank in ranks: rank.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, ends)
ranks = [subprocess.Popen(words, start_new_session={session}) for words in {words!r}]
while None in (codes := [rank.poll() for rank in ranks]):
    if any(codes): sleep(0.5)
    sleep(0.02)
sys.exit(next((code & 255 for code in codes if code), 0))
"""


def asks(stop: Stopping, number: int, *files: Path) -> None:
    """A signal to the conductor, once these files are there."""

    def wait() -> None:
        for file in files:
            pid_of(file)
        stop.hear(number, None)

    threading.Thread(target=wait, daemon=True).start()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pid_of(path: Path, patience: float = 20.0) -> int:
    deadline = time.monotonic() + patience
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} is not there"
        time.sleep(0.01)
    return int(path.read_text())


def is_gone_soon(pid: int, patience: float = 10.0) -> bool:
    deadline = time.monotonic() + patience
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)
