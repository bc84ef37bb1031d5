"""How an answer is judged, with figures that were worked out by hand."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from phased_cpt.evaluate.scores import best, is_exact, rouge_l

pytestmark = pytest.mark.requirement("E-04")


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("4", "4", True),
        ("  4\n", " 4", True),
        ("4  apples", "4 apples", True),
        ("\n\n4\nQuestion: 3 + 3", "4", True),  # a base model that goes on
        ("def f():\n    pass\nf()", "def f():\n  pass", True),
        ("4 apples", "4", False),
        ("44", "4", False),
        ("eos", "EOS", False),
        ("so: 4", "4", False),
        ("", "4", False),
    ],
)
def test_exact_is_the_same_text_but_for_blanks(said: str, answer: str, right: bool) -> None:
    assert is_exact(said, answer) is right


@pytest.mark.parametrize(
    ("said", "answer", "f1"),
    [
        # the cat _ on the mat: 5 words of 6 and of 6
        ("the cat sat on the mat", "the cat lay on the mat", 5 / 6),
        # a block: 2 of 4 words said, 2 of 2 wanted; 2 · 0.5 · 1 / 1.5
        ("a block of tokens", "a block", 2 / 3),
        ("A Block!", "a block", 1.0),
        ("новый блок", "новый ряд", 1 / 2),
        ("mat the", "the mat", 1 / 2),
        ("=>", "=>", 1.0),
        ("->", "=>", 0.0),
        ("nothing of it", "a block", 0.0),
        ("", "a block", 0.0),
    ],
)
def test_rouge_l_is_the_longest_common_subsequence_of_words(said: str, answer: str, f1: float) -> None:
    assert rouge_l(said, answer) == pytest.approx(f1)


def test_ascii_words_are_those_of_rouge_itself() -> None:
    """Without its own words it would count another score; with these, letters beyond z have one, too."""
    said, answer = "run_dir.py holds the run-folder's 12 paths", "The paths of a run folder: run_dir, 12"
    theirs = RougeScorer(["rougeL"]).score(answer, said)["rougeL"].fmeasure
    assert 0 < theirs < 1 and rouge_l(said, answer) == theirs
    assert RougeScorer(["rougeL"]).score("новый ряд", "новый блок")["rougeL"].fmeasure == 0


def test_the_accepted_answer_that_is_nearest_counts() -> None:
    assert best(rouge_l, "a block of tokens", ["the row", "a block"]) == pytest.approx(2 / 3)
    assert best(is_exact, "block", ["a block", "block"]) == 1.0
    assert best(is_exact, "row", ["a block", "block"]) == 0.0
