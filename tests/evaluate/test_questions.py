"""A file of questions: what it may hold, and how what is wrong with it is told."""

import gzip
from pathlib import Path

import pytest

from phased_cpt.errors import InputError
from phased_cpt.evaluate.questions import MAX_LINE_BYTES, read_questions
from tests.conftest import REPOSITORY, Write

pytestmark = pytest.mark.requirement("E-04")


def test_a_question_has_a_prompt_and_one_answer_or_several(write: Write) -> None:
    content = """\
        {"prompt": "2 + 2 =", "answer": "4"}

        {"id": 7, "answer": ["a block", "block"], "prompt": "A row?"}
    """
    first, second = read_questions(write(content, "q.jsonl"))
    assert (first.where, first.prompt, first.answers) == ("q.jsonl:1", "2 + 2 =", ("4",))
    assert (second.where, second.prompt, second.answers) == ("q.jsonl:3", "A row?", ("a block", "block"))
    assert read_questions(Path("q.jsonl"), limit=1) == [first]
    Path("q.jsonl.gz").write_bytes(gzip.compress(Path("q.jsonl").read_bytes()))
    assert [each.prompt for each in read_questions(Path("q.jsonl.gz"))] == [first.prompt, second.prompt]


def test_the_example_that_comes_along_can_be_read() -> None:
    assert len(read_questions(REPOSITORY / "dataset" / "questions.jsonl")) >= 5


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"answer": "4"}', "prompt: missing; needed is a text"),
        ('{"prompt": 4, "answer": "4"}', "prompt: a JSON number; needed is a text"),
        ('{"prompt": " ", "answer": "4"}', "prompt: an empty text; needed is a text"),
        ('{"prompt": "a"}', "answer: missing; needed is a text, or a list of those that are right"),
        ('{"prompt": "a", "answer": null}', "answer: a JSON null;"),
        ('{"prompt": "a", "answer": []}', "answer: an empty list;"),
        ('{"prompt": "a", "answer": ["4", 4]}', "answer: a list with a JSON number in it;"),
        ('{"prompt": "a", "answer": "4", "answer": "5"}', "the key 'answer' is given twice"),
        ('{"prompt": "a", "answer": NaN}', "NaN is not JSON"),
        ('["a", "4"]', "a JSON array; needed is one object per line"),
        ("what is it?", "invalid JSON: Expecting value at character 1"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(line: str, told: str, write: Write) -> None:
    with pytest.raises(InputError) as refused:
        read_questions(write(f'{{"prompt": "a", "answer": "b"}}\n{line}\n', "q.jsonl"))
    assert str(refused.value).startswith("q.jsonl:2: ") and told in str(refused.value)


def test_every_problem_is_told_at_once_up_to_twenty(write: Write) -> None:
    with pytest.raises(InputError) as refused:
        read_questions(write("{}\n" * 23, "q.jsonl"))
    said = str(refused.value).splitlines()
    assert [line.partition(" ")[0] for line in said[:20]] == [f"q.jsonl:{at}:" for at in range(1, 21)]
    assert said[20:] == ["and 3 more"]


def test_lines_are_counted_over_the_pieces_of_a_large_file(write: Write) -> None:
    long = '{"prompt": "' + "a" * 5_000_000 + '", "answer": "b"}\n'
    path = write(long * 4 + "{}\n", "q.jsonl")
    assert path.stat().st_size > MAX_LINE_BYTES
    with pytest.raises(InputError, match=r"^q\.jsonl:5: prompt: missing"):
        read_questions(path)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(content: str, write: Write) -> None:
    with pytest.raises(InputError, match=r'no question in it; a line is one, such as \{"prompt"'):
        read_questions(write(content, "q.jsonl"))


def test_what_is_no_file_of_questions_is_refused(write: Write) -> None:
    with pytest.raises(InputError, match=r"nix\.jsonl: no such file"):
        read_questions(Path("nix.jsonl"))
    write("a", "texts/a.txt")
    write("{}", "texts/b.jsonl")
    for path in ("texts/a.txt", "texts"):
        with pytest.raises(InputError, match="one file of JSON lines is needed"):
            read_questions(Path(path))
