"""The configuration with all that it means filled in can be run again, and means the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phased_cpt.config import Loaded, load
from phased_cpt.config.read import read_value
from phased_cpt.plan import make_plan
from phased_cpt.resolved import _inline, flat, resolved_values, resolved_yaml
from tests.conftest import REPOSITORY, Write

Load = Callable[..., Loaded]

ODD = """\
    run: {name: "1e5", output_dir: "no"}
    model: {name: "~", revision: "0123", from_config: null}
    data: {where: {type: commit, n: 1e-7, flag: true, "a b": [x, "1"]}}
    training: {learning_rate: 5e-5, max_grad_norm: null}
    phases:
      - {name: one, description: "it's: a # text\\nof two lines 😀", sources: [{path: "a: b"}]}
      - {name: two, sources: b, replay: {one: 0.25}, handover: merge}
      - {name: three, sources: c, lora: {r: 8}, training: {learning_rate: 1e-6}}
"""


def test_it_says_of_each_value_where_it_came_from(loaded: Load) -> None:
    text = "model: {name: m}\nphases:\n  - {name: one, sources: a, training: {learning_rate: 5e-5}}"
    lines = resolved_yaml(make_plan(loaded(text, "run.seed=7"))).splitlines()
    words = [line.split() for line in lines]
    assert ["name:", "m", "#", "run.yaml:1"] in words
    assert ["seed:", "7", "#", "command", "line"] in words
    assert ["learning_rate:", "0.0001", "#", "default"] in words
    assert ["learning_rate:", "5.0e-05", "#", "run.yaml:3", "(phase)"] in words


@pytest.mark.requirement("C-06")
@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_run_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    first = make_plan(load(path))
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(first))
    second = make_plan(load(again))
    assert resolved_values(second) == resolved_values(first) == yaml.safe_load(again.read_text())
    assert [phase.values("recipe") for phase in second.phases] == [phase.values("recipe") for phase in first.phases]


@pytest.mark.requirement("C-06")
def test_odd_values_come_back_as_they_were(write: Write, loaded: Load) -> None:
    first = make_plan(loaded(ODD))
    second = make_plan(load(write(resolved_yaml(first), "again.yaml")))
    assert resolved_values(second) == resolved_values(first) == yaml.safe_load(resolved_yaml(first))
    assert second.config.run.name == "1e5"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\x00")),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text("ab 1:#-", max_size=5), children, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(JSON)
def test_any_value_is_written_so_that_both_yamls_read_it_back(value: object) -> None:
    written = _inline(value)
    assert "\n" not in written, "a comment can stand behind it"
    assert read_value(written) == value
    assert yaml.safe_load(written) == value


def test_the_overlap_that_follows_is_written_where_it_holds(write: Write, loaded: Load) -> None:
    first = make_plan(loaded("model: {name: m}\ndata: {max_tokens: 512}\nphases: [{name: one, sources: a}]"))
    assert resolved_values(first)["data"]["overlap_tokens"] == 32
    assert resolved_values(first)["phases"][0]["data"] is None
    again = make_plan(load(write(resolved_yaml(first) + "  - {name: two, sources: b}\n", "again.yaml")))
    assert again.phases[1].settings.data.overlap_tokens == 32


def test_flat_paths_are_those_that_set_takes(loaded: Load) -> None:
    values = flat(resolved_values(make_plan(loaded(ODD))))
    assert values["phases.two.replay"] == {"one": 0.25}
    assert values["phases.three.training.learning_rate"] == 1e-6
    assert values["data.where"]["type"] == "commit", "a value stays whole"
