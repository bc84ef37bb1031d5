"""Programs that stand in for those that a script starts: each writes down what it was called with, and does as told."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PLAYED = """
import json, os, signal, sys, time
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(words) + "\\n")
if "--dry-run" in words:
    print(json.dumps({"run": {"state": os.environ.get("STATE", "not begun"), "run_dir": os.environ["RUN_DIR"]}}))
elif words[0] == "preflight":
    print("what was looked at")
    sys.exit(int(os.environ.get("LOOKED", "0")))
else:
    exec(os.environ.get("RUN", "print('step 1')"))
    sys.exit(int(os.environ.get("CODE", "0")))
"""

# A run that says which signals it has heard for a while, and then leaves as one does that has saved.
HEARS = """
heard = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
print("trains", os.getpid(), flush=True)
until = time.monotonic() + 30
while not heard and time.monotonic() < until:
    time.sleep(0.05)
time.sleep({seconds})
print("heard", *heard, "and sealed", flush=True)
sys.exit(75)
"""


def script(path: Path, text: str) -> Path:
    """A program: no path with a blank in it can stand behind a #!, so sh calls what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


class Stage:
    """A folder to stand in, with a blank in its name, and an environment whose phased_cpt only plays one."""

    def __init__(self, folder: Path) -> None:
        self.here = folder / "a folder"
        self.here.mkdir()
        self.calls_file = folder / "calls"
        self.environment_folder = folder / "an environment"
        played = folder / "played.py"
        played.write_text(PLAYED)
        python = script(
            self.environment_folder / "bin/python",
            'case "$*" in\n'
            '  "-P -c import "*) exit 0 ;;\n'
            f"  \"-P -m phased_cpt \"*) shift 3; exec '{sys.executable}' -I '{played}' \"$@\" ;;\n"
            f"esac\nexec '{sys.executable}' \"$@\"\n",
        )
        self.python = str(python)
        self.environment = {
            "PATH": "/usr/bin:/bin",
            "VIRTUAL_ENV": str(self.environment_folder),
            "CALLS": str(self.calls_file),
            "RUN_DIR": "outputs/r",
        }

    def calls(self, verb: str = "") -> list[list[str]]:
        """What phased_cpt was called with, the questions where a run is left out."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        words = [json.loads(line) for line in text.splitlines()]
        return [each for each in words if "--dry-run" not in each and verb in ("", each[0])]

    def call(self, program: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return ended(started([str(program), *words], self.environment | environment, self.here, subprocess.PIPE))

    def start(self, program: Path, *words: str, **environment: str) -> "subprocess.Popen[str]":
        return started([str(program), *words], self.environment | environment, self.here)


def started(
    words: list[str], environment: dict[str, str], here: Path | None = None, stderr: int = subprocess.STDOUT
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        words, env=environment, cwd=here, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, text=True
    )


def ended(called: "subprocess.Popen[str]", seconds: float = 60.0) -> "subprocess.CompletedProcess[str]":
    out, err = called.communicate(timeout=seconds)
    return subprocess.CompletedProcess(called.args, called.returncode, out, err)


def wait_until(is_so: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.05)


def says(path: Path, words: str) -> bool:
    return path.exists() and words in path.read_text()


def steps_of(folder: Path) -> list[int]:
    """The steps that were taken, as the runs in there have them in their logs."""
    return [
        json.loads(line)["step"]
        for path in folder.rglob("train.jsonl")
        for line in path.read_text().splitlines()
        if line.endswith("}")
    ]


def is_there(process: int) -> bool:
    """Whether a process runs; a dead one that nobody has asked for is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def kill_all_marked(mark: str) -> None:
    """What a test has left behind, known by its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found = mark.encode() in (folder / "environ").read_bytes()
        except OSError:
            continue
        if found and int(folder.name) != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(folder.name), signal.SIGKILL)
