"""Whatever bytes a configuration holds, the answer is a configuration or a message: never a traceback."""

import copy
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phased_cpt.config import Loaded, load
from phased_cpt.config.read import read_file
from phased_cpt.errors import ConfigError, InputError
from phased_cpt.plan import make_plan
from phased_cpt.resolved import resolved_yaml
from phased_cpt.tables import plan_facts, plan_table, shown
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.requirement("C-04")

SHIPPED = {path.stem: read_file(path).values for path in sorted((REPOSITORY / "configs").glob("*.yaml"))}

TOKENS = [
    "model", "name", "phases", "sources", "training", "learning_rate", "data", "lora", "run", "replay", ":", ": ", "-", "- ",
    "{", "}", "[", "]", ",", "\n", "\n  ", "\n    ", "\t", "#", "&a", "*a", "<<", "!!python/object:os.system", "!!int", "!",
    "|", ">", "?", "? ", "%YAML 1.2", "---", "...", "'", '"', "\\", "\\U00110000", "\\ud800", "~", "null", "true", "1e-4",
    "1_000", "1e999", "0x", ".inf", "9" * 5000, "\x00", "\x85", "\u2028", "\ufeff", "é", "\ud83d\ude00",
]  # fmt: skip

ODD_VALUES = [
    None, True, False, 0, -1, 1, 2**70, 1e-4, 1e308, float("nan"), "", "no", "zero3", "2GB", "a" * 300, "\x1b[31m", [], [None],
    [[]], ["x"], {}, {"": None}, {"name": 3}, {"path": "x", "weight": 0}, {"x": {"y": {"z": [1]}}},
]  # fmt: skip


def answer(content: bytes, folder: Path, name: str) -> Loaded | None:
    """Load it, and show it where it loads: no other error than a user's may come out."""
    path = folder / name
    path.write_bytes(content)
    try:
        loaded = load(path)
    except (InputError, ConfigError) as error:
        assert str(error).strip()
        assert all(str(path) in line for line in str(error).splitlines()), "every line says where"
        return None
    return loaded


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@given(content=st.binary(max_size=200))
@example(content=b"\xef\xbb\xbf")
@example(content=b"phases:\n  - - {name: a, name: b}")
@example(content=b"phases:\n - &p {name: a, sources: s, epochs: !!int 3}\n - {<<: *p, name: b}")
@example(content=b"d: &d {learning_rate: !!float 1}\ntraining: {<<: *d}")
@example(content=b"d: &d {a: 1, a: 2}\ntraining: {<<: *d}")
@example(content=b"phases: [{<<: {sources: [!x 1]}, name: a, sources: z}]")
@example(content=b"data: {max_line_bytes: '" + b"9" * 4400 + b"'}")
@example(content=b"%YAML 1.99999999999999999999999\n---\na: 1")
@example(content=b'"\\U00110000": 1')
@example(content=b"? {a: 1}\n: 2")
@example(content=b"? *x\n: 2")
@example(content=b"phases:\n- <<: [1]\n  name: x")
@example(content=b"? !!python/name:os.system x\n: 2")
def test_any_bytes(content: bytes, folder: Path) -> None:
    answer(content, folder, "any.yaml")
    answer(content, folder, "any.json")


def test_the_answer_tells_a_configuration_a_message_and_a_traceback_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what follows would notice."""
    assert answer(b"model: {name: m}", folder, "good.yaml") is not None
    assert answer(b"model: 3", folder, "bad.yaml") is None
    monkeypatch.setattr(sys.modules["phased_cpt.config.load"], "read_file", lambda path: [][0])
    with pytest.raises(IndexError):
        answer(b"model: {name: m}", folder, "good.yaml")


@example(tokens=["? ", "9" * 5000])
@example(tokens=["? ", "model", "\n", "\n  ", "model"])  # a key of two lines
@given(tokens=st.lists(st.sampled_from(TOKENS), max_size=25))
@settings(max_examples=400)
def test_anything_that_looks_like_yaml(tokens: list[str], folder: Path) -> None:
    answer("".join(tokens).encode("utf-8", "surrogatepass"), folder, "tokens.yaml")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@given(
    name=st.sampled_from(sorted(SHIPPED)),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(ODD_VALUES)), min_size=1, max_size=4),
)
@settings(max_examples=400)
def test_a_shipped_run_with_odd_values_in_any_place(name: str, changes: list[tuple[int, Any]], folder: Path) -> None:
    values = copy.deepcopy(SHIPPED[name])
    for where, odd in changes:
        path = (known := [p for p in places(values) if p])[where % len(known)]
        at = values
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = copy.deepcopy(odd)
    loaded = answer(json.dumps(values).encode(), folder, "odd.yaml")
    if loaded:
        plan = make_plan(loaded)
        shown(plan_table(plan))
        json.dumps(plan_facts(plan))
        (folder / "resolved.yaml").write_text(resolved_yaml(plan), encoding="utf-8")
        assert make_plan(load(folder / "resolved.yaml")).config.phases, "what is valid is valid when it is resolved"


@given(name=st.sampled_from(sorted(SHIPPED)), seed=st.integers(0, 10**6))
@settings(max_examples=200)
def test_a_shipped_run_with_lines_lost_doubled_and_swapped(name: str, seed: int, folder: Path) -> None:
    lines = (REPOSITORY / f"configs/{name}.yaml").read_text().splitlines()
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 4)):
        at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        match chance.randrange(4):
            case 0:
                lines[at] = ""
            case 1:
                lines.insert(other, lines[at])
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = lines[at].lstrip() if chance.random() < 0.5 else "  " + lines[at]
    answer("\n".join(lines).encode(), folder, "lines.yaml")
