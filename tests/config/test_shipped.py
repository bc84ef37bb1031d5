"""The files that come with the package work as they are, and say what they do."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jsonschema
import pytest

from phased_cpt.config import load
from phased_cpt.config.read import read_file
from phased_cpt.config.shipped import shipped_folder, shipped_names
from phased_cpt.plan import make_plan
from tests.conftest import REPOSITORY, Call

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
DEEPSPEED_FILES = sorted((REPOSITORY / "deepspeed_configs").glob("*.json"))


@pytest.mark.requirement("C-09")
def test_the_presets_are_the_ones_promised() -> None:
    assert {path.stem for path in CONFIGS} == {"demo", "qlora-small-gpu", "qlora-3b", "step-budget", "kat-dev-32b"}


@pytest.mark.requirement("C-09")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_run_opens_with_its_command_and_makes_a_plan_without_a_warning(path: Path) -> None:
    text = path.read_text()
    assert re.search(rf"phased-cpt (run|plan) -c configs/{path.name}", text.splitlines()[0])
    assert "# yaml-language-server: $schema=./schema.json" in text
    plan = make_plan(load(path))
    assert plan.warnings() == [] or path.stem == "demo", "the demo is short on purpose"
    assert all(phase.phase.description for phase in plan.phases)


def test_the_schema_that_editors_use_takes_every_shipped_run_and_refuses_a_broken_one() -> None:
    schema = json.loads((REPOSITORY / "configs/schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    editor = jsonschema.Draft202012Validator(schema)
    for path in CONFIGS:
        # An editor reads 1e-4 as a number, as YAML 1.2 has it; PyYAML would not.
        values = read_file(path).values
        assert [error.message for error in editor.iter_errors(values)] == []
        values["training"]["learning_rte"] = values["training"].pop("learning_rate", 1)
        assert [error.validator for error in editor.iter_errors(values)] == ["additionalProperties"]


@pytest.mark.requirement("C-08", "C-09")
def test_the_presets_have_the_values_they_are_named_for() -> None:
    kat, qlora = load(REPOSITORY / "configs/kat-dev-32b.yaml").config, load(REPOSITORY / "configs/qlora-3b.yaml").config
    assert (kat.model.name, kat.lora.r, kat.data.max_tokens, kat.launch.num_gpus) == (
        "Kwaipilot/KAT-Dev",
        128,
        32768,
        8,
    )
    assert (qlora.model.use_4bit, qlora.lora.r, qlora.lora.alpha, qlora.training.learning_rate) == (True, 16, 32, 2e-4)
    assert (qlora.training.micro_batch_size, qlora.training.gradient_accumulation_steps) == (2, 4)
    assert qlora.data.max_tokens == 2048


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)
def test_the_name_of_a_deepspeed_file_tells_the_truth(path: Path) -> None:
    content = json.loads(path.read_text())
    zero = content["zero_optimization"]
    offloads = {
        key for key in ("offload_optimizer", "offload_param") if zero.get(key, {}).get("device", "none") != "none"
    }
    assert path.stem.startswith(f"zero{zero['stage']}")
    assert ("offload" in path.stem) == bool(offloads)


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)
def test_a_deepspeed_file_leaves_to_the_plan_what_is_the_plans(path: Path) -> None:
    content = json.loads(path.read_text())
    from_the_plan = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    assert {key: content.pop(key) for key in from_the_plan} == dict.fromkeys(from_the_plan, "auto")
    assert content.pop("bf16") == content.pop("fp16") == {"enabled": "auto"}
    assert list(content) == ["zero_optimization"], "no optimizer, no scheduler, nothing misspelt"


def test_every_deepspeed_file_has_a_row_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` ", (REPOSITORY / "deepspeed_configs/README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == [path.stem for path in DEEPSPEED_FILES] == shipped_names("deepspeed_configs")


def test_a_shipped_run_can_be_called_by_its_name_from_anywhere(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("plan", "-c", "qlora-3b").out.startswith("qlora-3b: 3 phases on meta-llama/Llama-3.2-3B (4-bit)")
    assert call("plan", "-c", "qlora-4b").code == 2


@pytest.mark.requirement("X-01")
def test_what_is_installed_is_what_is_pinned_and_all_that_is_asked_for_has_a_pin() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    assert {"flash-attn", "gigatoken", "gpu-kernels", "lm-eval", "tracking", "dev"} == extras.keys()
    asked = [*project["dependencies"], *extras["tracking"], *extras["lm-eval"], *extras["dev"]]
    names = [re.split(r"[>=]", requirement)[0].strip().lower() for requirement in asked]
    assert [name for name in names if name not in pins] == []
    installed = {dist.name.lower(): dist.version.partition("+")[0] for dist in importlib.metadata.distributions()}
    checked = {name: version for name, version in installed.items() if name in pins}
    assert {"pydantic", "pyyaml", "typer"} <= checked.keys()
    assert {name: version for name, version in checked.items() if version != pins[name]} == {}


def test_a_wheel_carries_the_shipped_files_inside_the_package(tmp_path: Path) -> None:
    pip = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w"]
    build = [sys.executable, *pip, str(tmp_path), str(REPOSITORY)]
    subprocess.run(build, check=True, timeout=300, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = """
import sys; sys.path.insert(0, ".")
from phased_cpt.config.shipped import shipped_folder, shipped_names
print(shipped_folder("configs"), *shipped_names("configs"), *shipped_names("deepspeed_configs"))
"""
    run = [sys.executable, "-c", program]
    folder, *names = subprocess.check_output(run, text=True, cwd=tmp_path / "site").split()
    assert names == [*shipped_names("configs"), *shipped_names("deepspeed_configs")]
    assert Path(folder) == tmp_path / "site/phased_cpt/configs" != shipped_folder("configs")
