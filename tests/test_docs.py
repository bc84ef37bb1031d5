"""What the pages say is held against what is there."""

import re
from typing import Any

import pytest

from tests.conftest import REPOSITORY, SAMPLE, TOKENIZER, Answer, Call, Write

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "deepspeed_configs/README.md",
    "docs/decisions/README.md",
    "dataset/README.md",
    "docs/chat.md",
    "docs/data-mixing.md",
    "docs/evaluate.md",
    "docs/forgetting.md",
    "docs/merge.md",
    "docs/preflight.md",
    "docs/report.md",
    "docs/serving.md",
]


def test_every_module_is_on_the_map() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    modules = {path.name for path in (REPOSITORY / "phased_cpt").rglob("*.py") if not path.name.startswith("__")}
    assert len(modules) > 15
    assert sorted(name for name in modules if name not in readme) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = REPOSITORY / page
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_decision_is_on_its_page() -> None:
    folder = REPOSITORY / "docs/decisions"
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text())
    assert listed == sorted(path.name for path in folder.glob("0*.md"))


def test_tests_that_are_named_exist() -> None:
    pages = [REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs/decisions").glob("0*.md")]
    words = "\n".join(page.read_text() for page in pages)
    paths = re.findall(r"`((?:tests|phased_cpt|tools|configs)/[\w/]+\.\w+)`", words)
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    names = re.findall(r"`(test_\w+)`", words)
    tests = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert len(names) > 6
    assert [name for name in names if f"def {name}(" not in tests] == []


def readme_run(write: Write) -> None:
    """The curriculum of the README, with the sample as its data, and its tokenizer in the place of one of the hub."""
    text = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)[0]
    write(text.replace("Qwen2.5-Coder-7B}", f"Qwen2.5-Coder-7B, tokenizer: {TOKENIZER}}}"))
    for file in SAMPLE.glob("phase*.jsonl"):
        write(file.read_bytes(), f"dataset/{file.name}")


def test_the_curriculum_of_the_readme_and_its_commands_work(write: Write, call: Call) -> None:
    readme_run(write)
    shell = re.findall(r"^phased-cpt (.*?)(?: \||\s+#|$)", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    answers: dict[str, Answer] = {typed: call(*typed.split()) for typed in shell}
    assert len(answers) == 8
    assert {typed: answer.code for typed, answer in answers.items() if answer.code} == {"status": 2}, "no run yet"


def test_the_mistakes_of_the_readme_are_told_as_it_says(write: Write, call: Call) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    promised = re.findall(r"^run\.yaml:\d+: .*", readme, re.MULTILINE)
    text = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)[0]
    write(text.replace("    epochs: 3", "    epoch: 3").replace("learning_rate: 5e-5", "learning_rate: 5"))
    told = call("plan", "-c", "run.yaml").err.splitlines()
    assert len(told) == len(promised) == 2
    for line, promise in zip(told, promised, strict=True):
        assert line.startswith(promise.partition("…")[0].rstrip(", "))


@pytest.mark.requirement("C-03")
def test_the_python_of_the_readme_works(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    readme_run(write)
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), found)
    assert capsys.readouterr().out == "Batch(rows=24, micro_batch_size=1, accumulation=6, ranks=4) 5e-05\n"
    assert len(blocks) == 2
    assert found["batch"]["labels"].shape[1] == 8192
