"""Ranks that only talk: started by each launcher, and alone where another was to come."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phased_cpt.launchers import free_port
from phased_cpt.preflight.network import _collective

ALONE = """
import sys
from phased_cpt.probe import ring
ring.MEETING_SECONDS = 2.0
ring.main(sys.argv[1:])
"""


def test_a_rank_that_waits_in_vain_leaves_word(tmp_path: Path) -> None:
    """A firewall between two machines looks like this."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "job.json")]
    alone = subprocess.run(command, env=os.environ | ranks | meeting, capture_output=True, check=False)
    word = json.loads((tmp_path / "logs/failed-0.json").read_bytes())
    assert alone.returncode == 1
    assert word["message"].startswith("the ranks do not reach each other: ")
    assert "look at the firewall" in word["message"]
    assert not (tmp_path / "heard.json").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", ["local", "torchrun", "deepspeed"])
def test_each_launcher_starts_a_ring(launcher: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(tmp_path):
        heard = _collective(launcher, 2)
    assert (heard["ranks"], heard["backend"]) == (2, "gloo")
    assert heard["bytes_per_second"] > 0
    assert capfd.readouterr().out == "", "what launchers print is none of the answer"
