"""Training from Python, as docs/training.md shows it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.journeys.conftest import Tiny


@pytest.mark.requirement("T-13", "L-05")
def test_the_python_of_the_training_page_works(tiny: Tiny) -> None:
    """In a process of its own: its last lines load torch, which this one does without."""
    config = tiny()
    config |= {"launch": {"num_gpus": 1}, "phases": config["phases"][:1]}
    Path("run.yaml").write_text(json.dumps(config))
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/training.md").read_text(), re.DOTALL)
    answer = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "('foundation',) cpu"
    assert Path("run/final_model/training_info.json").exists()
