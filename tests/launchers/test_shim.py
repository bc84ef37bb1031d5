"""launch/bin/deepspeed, in front of a deepspeed that only says what it was given."""

import ast
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SHIM = REPOSITORY / "launch/bin/deepspeed"
SAYS = '#!/bin/sh\nprintf "%s\\n" "$@"\n'
ENDS_WITH_7 = "#!/bin/sh\nexit 7\n"
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]

Called = Callable[..., subprocess.CompletedProcess[str]]


def program(folder: Path, text: str = SAYS) -> Path:
    """A folder with a deepspeed in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "deepspeed").write_text(text)
    (folder / "deepspeed").chmod(0o755)
    return folder


@pytest.fixture
def called(tmp_path: Path) -> Called:
    """Call the shim; in PATH it stands before the deepspeed that says its arguments, unless another PATH is given."""
    real = program(tmp_path / "venv/bin")

    def call(*words: str, path: str | None = None, by: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        folders = f"{SHIM.parent}:{real}" if path is None else path
        environment = {"PATH": f"{folders}:/usr/bin:/bin"}
        found = shutil.which("deepspeed", path=environment["PATH"]) if by is None else None
        return subprocess.run(
            [*(by or [found or str(SHIM)]), *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=20
        )  # fmt: skip

    return call


LINES = {
    "--num_gpus=8 -m phased_cpt -c run.yaml": "--num_gpus=8 --module phased_cpt -c run.yaml",
    "--num_gpus 8 -m phased_cpt -c run.yaml": "--num_gpus 8 --module phased_cpt -c run.yaml",
    "-i localhost:2,3 -q -m phased_cpt": "-i localhost:2,3 -q --module phased_cpt",
    "--master_port=29501 --no_local_rank -m phased_cpt": "--master_port=29501 --no_local_rank --module phased_cpt",
    "-m phased_cpt -m other": "--module phased_cpt -m other",
    # Nothing of it is the launcher's:
    "train.py -m fast": "train.py -m fast",
    "--num_gpus=2 train.py -m fast": "--num_gpus=2 train.py -m fast",
    "--num_gpus 2 train.py -m fast": "--num_gpus 2 train.py -m fast",
    "-q train.py -m fast": "-q train.py -m fast",
    "--module phased_cpt -m fast": "--module phased_cpt -m fast",
    "-- -m phased_cpt": "-- -m phased_cpt",
    "": "",
}


@pytest.mark.requirement("P-01")
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("line", LINES)
def test_m_of_the_launcher_becomes_module_and_nothing_else_is_touched(line: str, shell: str, called: Called) -> None:
    answer = called(*line.split(), by=[shell, str(SHIM)])
    assert answer.stderr == ""
    assert answer.stdout.split() == LINES[line].split()


@pytest.mark.parametrize("shell", SHELLS)
def test_words_are_passed_on_as_they_are(shell: str, called: Called) -> None:
    words = ["-m", "phased_cpt", "--set", "run.name=a b", "*", "$HOME", "", "it's", 'a "b"', "back\\slash"]
    answer = called(*words, by=[shell, str(SHIM)])
    assert answer.stdout.split("\n")[:-1] == ["--module", *words[1:]]


def test_the_exit_code_is_that_of_deepspeed(called: Called, tmp_path: Path) -> None:
    seven = program(tmp_path / "seven", ENDS_WITH_7)
    assert called("-m", "phased_cpt", path=f"{SHIM.parent}:{seven}").returncode == 7
    assert called("-m", "phased_cpt").returncode == 0


@pytest.mark.parametrize("way", ["a link", "a folder that is a link", "a relative folder", "the folder one is in", "twice",
                                 "a copy in another checkout", "behind the real one"])  # fmt: skip
def test_it_never_calls_itself_nor_another_shim(way: str, called: Called, tmp_path: Path) -> None:
    real, here, by = tmp_path / "venv/bin", f"{SHIM.parent}", [str(SHIM)]
    (tmp_path / "linked").mkdir()
    if way == "a link":
        (tmp_path / "linked/deepspeed").symlink_to(SHIM)
        path, by = f"{tmp_path}/linked:{here}:{real}", [str(tmp_path / "linked/deepspeed")]
    elif way == "a folder that is a link":
        (tmp_path / "bin").symlink_to(SHIM.parent)
        path, by = f"{tmp_path}/bin:{real}", [str(tmp_path / "bin/deepspeed")]
    elif way == "a relative folder":
        path, by = f"{os.path.relpath(SHIM.parent, tmp_path)}:{real}", [os.path.relpath(SHIM, tmp_path)]
    elif way == "the folder one is in":
        shutil.copy(SHIM, tmp_path)
        path, by = f":{real}", ["./deepspeed"]
    elif way == "twice":
        path = f"{here}:{here}:{real}"
    elif way == "a copy in another checkout":
        shutil.copy(SHIM, tmp_path / "linked")
        path = f"{here}:{tmp_path}/linked:{here}:{real}"
    else:
        path = f"{real}:{here}"
    answer = called("-m", "phased_cpt", path=path, by=by)
    assert (answer.stdout, answer.stderr) == ("--module\nphased_cpt\n", "")


def test_a_folder_or_a_file_that_cannot_be_run_is_passed_by(called: Called, tmp_path: Path) -> None:
    (tmp_path / "folder/deepspeed").mkdir(parents=True)
    (program(tmp_path / "no") / "deepspeed").chmod(0o644)
    path = f"{SHIM.parent}:{tmp_path}/folder:{tmp_path}/no"
    assert called("-m", "x", path=f"{path}:{tmp_path}/venv/bin").stdout == "--module\nx\n"
    assert called("-m", "x", path=path).returncode == 127, "the control: there is no other"


def test_without_deepspeed_it_says_what_to_do(called: Called) -> None:
    answer = called("-m", "phased_cpt", path=str(SHIM.parent))
    assert answer.returncode == 127
    assert "no other deepspeed in PATH" in answer.stderr
    assert "activate the environment" in answer.stderr


def test_the_options_with_a_value_are_those_of_deepspeed(called: Called) -> None:
    """Each option of its launcher in front of a script: what follows is the script, or else the option's value."""
    found = importlib.util.find_spec("deepspeed")
    assert found and found.origin
    source = ast.parse((Path(found.origin).parent / "launcher/runner.py").read_text())
    calls = [
        each
        for each in ast.walk(source)
        if isinstance(each, ast.Call) and getattr(each.func, "attr", "") == "add_argument"
    ]
    seen = {True: 0, False: 0}
    for each in calls:
        names = [word.value for word in each.args if isinstance(word, ast.Constant)]
        has_value = not any(word.arg == "action" for word in each.keywords)
        for name in (str(name) for name in names if str(name).startswith("-")):
            given = called(name, "word", "-m", "x").stdout.split()
            assert given == [name, "word", "--module" if has_value else "-m", "x"], name
            seen[has_value] += 1
    assert min(seen.values()) > 8
