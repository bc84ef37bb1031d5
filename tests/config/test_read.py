"""A file becomes plain values and their lines, or one message that says why it cannot."""

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phased_cpt.config.read import plain_scalar, read_file, read_value
from phased_cpt.errors import InputError
from tests.conftest import Write

pytestmark = pytest.mark.requirement("C-04")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),  # YAML 1.1 reads a text
        ("1E5", 1e5),
        ("-2.5", -2.5),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", 10),  # YAML 1.1 reads octal 8
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),  # YAML 1.1 reads false
        ("on", "on"),
        ("1:30", "1:30"),  # YAML 1.1 reads 90
        ("2026-11-20", "2026-11-20"),  # YAML 1.1 reads a date
        ("2GB", "2GB"),
        ("12e", "12e"),
        (".inf", math.inf),
        ("'1e-4'", "1e-4"),
        ('"1"', "1"),
        ("!!str 1", "1"),
        ("0x_", "0x_"),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_scalars_mean_what_people_mean(written: str, value: object) -> None:
    assert read_value(written) == value
    assert type(read_value(written)) is type(value)


def test_pyyaml_would_have_read_some_of_them_otherwise() -> None:
    assert [yaml.safe_load(text) for text in ("1e-4", "010", "no", "1:30")] == ["1e-4", 8, False, 90]


def test_each_value_has_the_line_it_stands_on(write: Write) -> None:
    written = read_file(write("run:\n  name: a\n\nphases:\n  - name: x\n    sources:\n    - p\n    - q\n"))
    assert written.places["run", "name"] == "run.yaml:2"
    assert written.places["phases", 0, "name"] == "run.yaml:5"
    assert written.places["phases", 0, "sources", 1] == "run.yaml:8"


def test_json_is_read_with_its_lines_too(write: Write) -> None:
    written = read_file(write('{"run":\n\t{"name": "\\ud83d\\ude00\\/\\t",\n\t "seed": 1e2}}', "run.json"))
    assert written.values == {"run": {"name": "😀/\t", "seed": 100.0}}
    assert written.places["run", "seed"] == "run.json:3"


def test_the_schema_that_a_json_file_names_for_its_editor_is_passed_over(write: Write) -> None:
    assert read_file(write('{"$schema": "./schema.json", "run": {}}', "run.json")).values == {"run": {}}


def test_anchors_aliases_and_merge_keys_work(write: Write) -> None:
    written = read_file(write("a: &base {x: 1, y: 2}\nb: {<<: *base, y: 3}\nc: *base\nd: {<<: [{x: 7}, *base]}\n"))
    assert written.values == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 2},
        "d": {"x": 7, "y": 2},
    }


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "run.yaml: the file is empty"),
        (b"# only a comment\n\n", "run.yaml: the file is empty"),
        (b"- a\n- b\n", "run.yaml:1: a list stands at the top"),
        (b"just a text\n", "run.yaml:1: a single value stands at the top"),
        (b"run:\n\tname: x\n", "run.yaml:2: a tab stands here; YAML is indented with blanks"),
        (b"run: {name: x\n", "run.yaml:2: not valid YAML"),
        (b"run: a: b\n", "run.yaml:1: a colon where none can stand"),
        (b"a: 1\n---\nb: 2\n", "run.yaml:2: a second document begins here"),
        (b"run: {name: \xff}\n", "run.yaml:1: byte 12 is not UTF-8; save the file as UTF-8"),
        ("run: {}".encode("utf-16"), "run.yaml: the file is UTF-16; save it as UTF-8"),
        (b"run:\n  name: a\x00b\n", "run.yaml:2: the character U+0000 is not allowed"),
        (BOMB.encode(), "run.yaml: more than 100,000 values once its aliases are followed"),
        (b"a: &a [*a]\n", "run.yaml:1: nested deeper than 40 levels, or an alias of itself"),
        (b"a: " + b"[" * 60 + b"]" * 60, "run.yaml:1: nested deeper than 40 levels"),
        (b"a: " + b"[" * 100_000, "run.yaml: nested too deeply"),
        (b"#" + b" " * 2**22 + b"\n", "run.yaml: larger than 4,194,304 bytes"),
        (b"a: *nobody\n", "run.yaml:1: not valid YAML: found undefined alias"),
        (b'"\\UFFFFFFFF": 1\n', "run.yaml: not valid YAML"),
        (b"!foo {a: 1}\n", "run.yaml:1: given the tag !foo; allowed: plain values"),
    ],
)
def test_a_file_that_cannot_be_read_gets_its_own_message(write: Write, content: bytes, message: str) -> None:
    with pytest.raises(InputError) as refused:
        read_file(write(content))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "run.json: the file is empty"),
        (b'{"a" 1}', "run.json:1: not valid JSON: expecting ':' delimiter (column 6)"),
        (b'{\n"a": }', "run.json:2: not valid JSON: expecting value (column 6)"),
        (b"[1]", "run.json:1: a list stands at the top"),
        (b"[" * 100_000, "run.json: nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "run.json: not valid JSON: Exceeds the limit"),
    ],
)
def test_json_that_cannot_be_read_gets_its_own_message(write: Write, content: bytes, message: str) -> None:
    with pytest.raises(InputError) as refused:
        read_file(write(content, "run.json"))
    assert str(refused.value).startswith(message)


def test_a_missing_file_and_a_folder_are_named(write: Write, tmp_path: Path) -> None:
    write("x: 1", "configs/run.yaml")
    with pytest.raises(InputError, match=r"nope.yaml: no such file \(looked from .*\)"):
        read_file(Path("nope.yaml"))
    with pytest.raises(InputError, match="configs: this is a folder; name the YAML or JSON file in it"):
        read_file(Path("configs"))
    with pytest.raises(InputError, match="cannot be read: "):
        read_file(Path("configs/run.yaml/inside.yaml"))


def test_a_tag_builds_nothing_and_is_named(write: Write, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    written = read_file(write(f"run:\n  name: !!python/object/apply:os.system ['touch {canary}']\n"))
    assert [str(problem) for _, problem in written.problems] == [
        "run.yaml:2: run.name: given the tag !!python/object/apply:os.system; "
        "allowed: plain values, nothing is built from a tag"
    ]
    assert not canary.exists()
    yaml.unsafe_load(f"!!python/object/apply:os.system ['touch {canary}']")
    assert canary.exists(), "the canary would have shown it"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("seed: !!int 5", "given the tag !!int; allowed: plain values, nothing is built from a tag"),
        ("seed: 99999999999999999999", "given a number of too many digits"),
        (f"seed: {'9' * 5000}", "given a number of too many digits"),
        (f"seed: 0x{'f' * 5000}", "given a number of too many digits"),
        ('name: "a\\0b"', "given a text with the character U+0000"),
        ("[a, b]: 1", "given a list or a mapping as a key; allowed: a text"),
        ("<<: [1]", "given << with something that is not a mapping"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_and_the_rest_is_read(write: Write, line: str, problem: str) -> None:
    written = read_file(write(f"run:\n  {line}\n  dir: here\n"))
    assert [found.message for _, found in written.problems] == [problem]
    assert written.problems[0][1].where == "run.yaml:2"
    assert written.values["run"]["dir"] == "here"


def test_a_key_given_twice_names_both_lines(write: Write) -> None:
    written = read_file(write("run: {seed: 1}\nmodel: {name: x}\nrun: {seed: 2}\n"))
    assert [str(problem) for _, problem in written.problems] == ["run.yaml:3: run: given twice; first at run.yaml:1"]
    assert written.values["run"] == {"seed": 1}


def test_a_value_of_the_command_line_is_held_to_the_same(write: Write) -> None:
    with pytest.raises(InputError, match="given the tag !!python/name:os"):
        read_value("!!python/name:os.system x")


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"))
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=200)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(KEYS, children, max_size=4),
    max_leaves=12,
)


@given(values=st.dictionaries(KEYS, JSON_VALUES, max_size=4), ascii_only=st.booleans())
def test_json_reads_as_the_values_that_were_written(
    values: dict[str, object], ascii_only: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(values, ensure_ascii=ascii_only, indent="\t"), encoding="utf-8", newline="")
    values.pop("$schema", None)  # an editor's, not ours
    assert read_file(path).values == values


@given(number=st.floats(allow_nan=False) | st.integers())
def test_every_number_that_python_prints_is_read_back(number: float) -> None:
    text = repr(number).replace("inf", ".inf")
    assert plain_scalar(text) == number
