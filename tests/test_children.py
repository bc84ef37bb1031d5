"""A child is this program, whatever lies where it is called from."""

import subprocess
import sys
from pathlib import Path

import pytest

from phased_cpt import children

PROBE = ["-c", "import queue, phased_cpt; print(phased_cpt.__file__)"]


def test_what_lies_in_the_folder_is_not_taken_for_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("queue.py").write_text("raise SystemExit('mine')")
    Path("phased_cpt").mkdir()
    Path("phased_cpt/__init__.py").write_text("raise SystemExit('an older one')")
    [program, *options, _, _] = children.command("phased_cpt.merge")
    found = subprocess.run([program, *options, *PROBE], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.strip() == str(Path(children.HERE, "phased_cpt/__init__.py"))
    control = subprocess.run([sys.executable, *PROBE], capture_output=True, text=True)
    assert control.returncode == 1 and control.stderr.strip() in ("mine", "an older one")
    assert children.safe_path() == {"PYTHONSAFEPATH": "1"}


def test_a_checkout_that_one_stands_in_is_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(children.HERE)
    assert children.command("phased_cpt.merge") == [sys.executable, "-m", "phased_cpt.merge"]
    assert children.safe_path() == {}
