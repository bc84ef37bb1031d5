"""The floors hold: imports only go down, none of them loads torch, and the check would notice."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    return subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The house, to be damaged."""
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(REPOSITORY / "phased_cpt", tmp_path / "phased_cpt", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_floors_hold(copy: Path) -> None:
    answer = lint_imports(copy)
    assert "0 broken" in answer.stdout, answer.stdout + answer.stderr
    assert answer.returncode == 0


def test_every_room_but_the_heavy_ones_is_held_to_import_no_torch() -> None:
    """A room that needs torch is named here, and the others are listed in the contract."""
    heavy = {
        f"phased_cpt.{room}"
        for room in ("chat", "evals", "evaluate", "merge", "model", "probe", "ranks", "train", "worker")
    }
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (light,) = (contract for contract in contracts if contract["type"] == "forbidden")
    rooms = {f"phased_cpt.{path.stem}" for path in (REPOSITORY / "phased_cpt").iterdir() if path.stem[:2] != "__"}
    assert light["source_modules"] == (["phased_cpt"] if not heavy else sorted(rooms - heavy))


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("run_dir.py", "from phased_cpt import cli", "Floors: imports only go down BROKEN"),
        ("errors.py", "from phased_cpt import run_dir", "Floors: imports only go down BROKEN"),
        ("plan.py", "def late():\n    import torch", "The floors that plan never load torch, at any depth BROKEN"),
        ("homeless.py", "", "every child of every container"),
        ("config/schema.py", "from phased_cpt.config import load", "No import cycles BROKEN"),
    ],
    ids=["up", "further up", "torch inside a function", "a module without a floor", "a cycle"],
)
def test_a_breach_is_noticed(copy: Path, file: str, line: str, broken: str) -> None:
    with (copy / "phased_cpt" / file).open("a") as module:
        module.write(f"\n\n{line}\n")
    answer = lint_imports(copy)
    assert answer.returncode != 0
    assert broken in answer.stdout
