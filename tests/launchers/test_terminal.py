"""A terminal of our own, which is closed while a program prints to it."""

import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.launchers.programs import Jobs, pid_of

PRINTS = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
print("here", flush=True)
say("prints")
wait("closed")
if {leaves}:
    from phased_cpt.stopping import leave_a_closed_terminal
    leave_a_closed_terminal()
try:
    print("there", flush=True); print("there", file=sys.stderr, flush=True)
    (here / "said").write_text("well")
except OSError as error:
    (here / "said").write_text(str(error))
    os._exit(1)
"""


@pytest.mark.parametrize("leaves, said", [(True, "well"), (False, "[Errno 5] Input/output error")])
def test_printing_to_a_terminal_that_was_closed(leaves: bool, said: str, job: Jobs, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    program = subprocess.Popen(job.words("0.pid", PRINTS.format(leaves=leaves)), stdout=slave, stderr=slave)
    os.close(slave)
    pid_of(tmp_path / "prints")
    os.close(master)
    (tmp_path / "closed").touch()
    program.wait(20)
    assert (tmp_path / "said").read_text() == said


def test_a_pipe_and_a_file_stay(job: Jobs) -> None:
    does = "from phased_cpt.stopping import leave_a_closed_terminal as leave; leave(); print('still')"
    answer = subprocess.run([*job.words("0.pid", does)], stdout=subprocess.PIPE, text=True, timeout=20)
    assert answer.stdout == "still\n"
