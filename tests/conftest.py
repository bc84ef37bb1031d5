"""What many tests share: a folder of their own, files written on the page, and the command line called in-process."""

import json
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

from phased_cpt.cli import main
from phased_cpt.config import Loaded, load
from phased_cpt.errors import ConfigError

# No deadlines: the machine is shared. CI tries the same examples every time, people others at each call.
settings.register_profile("people", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "people")

pytest_plugins = ["tests.faults.matrix"]

# Under nohup it is ignored, by whatever is started here as well: rightly so of a run, but then no test of it can pass.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "dataset" / "sample"
TOKENIZER = SAMPLE / "tokenizer.json"

MINIMAL = """\
    model: {name: some/model}
    phases:
      - {name: foundation, sources: a.jsonl}
      - {name: evolution, sources: b.jsonl}
"""


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Write = Callable[..., Path]
Call = Callable[..., Answer]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file in the test's own folder, which is the working directory, so that messages say `run.yaml:3`."""
    monkeypatch.chdir(tmp_path)

    def write_file(content: str | bytes, name: str = "run.yaml") -> Path:
        raw = content if isinstance(content, bytes) else textwrap.dedent(content).encode()
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(raw)
        return Path(name)

    return write_file


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Call phased-cpt as the shell would."""

    def call_main(*arguments: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        code = stop.value.code
        return Answer(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call_main


@pytest.fixture
def loaded(write: Write) -> Callable[..., Loaded]:
    """Load a configuration that stands on the page."""
    return lambda text, *overrides: load(write(text), overrides)


@pytest.fixture
def config(write: Write) -> Callable[..., Path]:
    """The configuration of a run with one phase for each source."""

    def written(*sources: str, **data: Any) -> Path:
        phases = [{"name": f"phase_{at}", "sources": source} for at, source in enumerate(sources)]
        shape = {"model_type": "llama", "vocab_size": 4096, "max_position_embeddings": 512}
        content = {
            "model": {"from_config": shape, "tokenizer": str(TOKENIZER)},
            "data": {"max_tokens": 64, "overlap_tokens": 8, **data},
            "phases": phases,
        }
        return write(json.dumps(content), "run.json")

    return written


@pytest.fixture
def problems(write: Write) -> Callable[..., list[str]]:
    """The problems of a configuration that stands on the page, as they are shown."""

    def found(text: str | bytes, *overrides: str, name: str = "run.yaml") -> list[str]:
        with pytest.raises(ConfigError) as refused:
            load(write(text, name), overrides)
        return str(refused.value).splitlines()

    return found


def with_phases(text: str) -> str:
    """A configuration with a model and one phase around what the test is about."""
    head = "model: {name: some/model}\nphases: [{name: one, sources: a.jsonl}]\n"
    return head + textwrap.dedent(text)


# Which rows of the requirements are proven -----------------------------------------------------------------------------

_LAST_OF = {"C": 9, "D": 11, "K": 11, "S": 8, "P": 8, "T": 13, "L": 5, "E": 5, "G": 4, "R": 5, "M": 4, "I": 4, "X": 4}
REQUIREMENTS = [f"{letter}-{number:02}" for letter, last in _LAST_OF.items() for number in range(1, last + 1)]
_proven: set[str] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("requirement"):
            unknown = [row for row in marker.args if row not in REQUIREMENTS]
            assert not unknown, f"{item.nodeid}: there is no requirement {', '.join(unknown)}"
            _proven.update(marker.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    owed = [row for row in REQUIREMENTS if row not in _proven]
    which = f" ({', '.join(owed)})" if terminalreporter.verbosity > 0 else ""
    terminalreporter.write_line(f"requirements without a test: {len(owed)} of {len(REQUIREMENTS)}{which}")
