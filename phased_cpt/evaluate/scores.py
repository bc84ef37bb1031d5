"""How an answer is judged by what is right.

said    "The answer:\\n  4  apples\\nand so on"     accepted  "4 apples"
judged  as many lines as the accepted answer has, from the first that is not blank; blanks count as one
"""

import re
from collections.abc import Callable, Sequence

from rouge_score.rouge_scorer import RougeScorer


class Words:
    """The words of a text. ROUGE's own know the letters a to z alone; for these they are the same."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


_ROUGE = RougeScorer(["rougeL"], tokenizer=Words())


def is_exact(said: str, answer: str) -> bool:
    """The same text, however many blanks stand where."""
    return _plain(_judged(said, answer)) == _plain(answer)


def rouge_l(said: str, answer: str) -> float:
    """F1 of the longest common subsequence of words; an answer without a word is right or wrong."""
    score: float = _ROUGE.score(answer, _judged(said, answer))["rougeL"].fmeasure
    return 1.0 if is_exact(said, answer) else score


def best(score: Callable[[str, str], float], said: str, answers: Sequence[str]) -> float:
    """By the accepted answer that it is nearest to."""
    return max(float(score(said, answer)) for answer in answers)


def _judged(said: str, answer: str) -> str:
    """Base models go on where they should stop, so what stands below the lines of an answer is not looked at."""
    return "\n".join(said.strip().splitlines()[: len(answer.strip().splitlines())])


def _plain(text: str) -> str:
    return " ".join(text.split())
