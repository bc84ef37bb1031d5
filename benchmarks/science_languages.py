"""Made-up languages with the same words, and dialects of one, each with facts of its own: what science.py trains on.

A document is about a few things and goes from one to the next. What a model can learn of a language is its grammar, and
facts: which word goes with which. Four in ten facts are others in each, so that it is learnt at the cost of the others.

home   meri felara-ta fime-sh nelu migave-n.    adjective subject(many) verb(many) adjective object
north  felara-sh lamo migave-ta seri fime-n.    subject(many) adjective object adjective verb(many)
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

LEXICON_SEED = 0
NOUNS, VERBS, ADJECTIVES, TOPIC = 160, 60, 60, 20
LIKELY = (0.6, 0.3, 0.1)  # of the three words that go with another one
CHANCE = 0.05  # … or any
COMMON = 0.6  # of the facts are the same everywhere
TRAINED, HELD_OUT = 12_000, 300  # documents of a language


@dataclass(frozen=True)
class Grammar:
    """How a sentence is put together."""

    order: str
    adjective_first: bool
    plural: str  # of nouns
    agreeing: str  # of verbs, with a subject in the plural
    object_ending: str


# The same three endings everywhere: what is new is what they mean, and not that they are there.
HERE = Grammar("SVO", True, plural="-ta", agreeing="-sh", object_ending="-n")
LANGUAGES = {
    "home": HERE,
    "north": Grammar("SOV", False, plural="-sh", agreeing="-n", object_ending="-ta"),  # a strong shift
    "coast": HERE,  # dialects: other facts alone
    "hills": HERE,
    "plain": HERE,
}


def words(count: int, syllables: int, rng: random.Random, taken: set[str]) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))
        if word not in taken:
            taken.add(word)
            found.append(word)
    return found


class Language:
    """The words of all of them, and the facts of this one."""

    def __init__(self, name: str) -> None:
        self.grammar, lexicon, taken = LANGUAGES[name], random.Random(LEXICON_SEED), set[str]()
        self.nouns, self.verbs, self.adjectives = (
            words(count, syllables, lexicon, taken) for count, syllables in ((NOUNS, 3), (VERBS, 2), (ADJECTIVES, 2))
        )
        own, common = random.Random(name), random.Random(LEXICON_SEED)
        shuffled = common.sample(self.nouns, NOUNS)
        self.topics = [shuffled[at : at + TOPIC] for at in range(0, NOUNS, TOPIC)]

        def three(among: list[str]) -> list[str]:
            everywhere, here = common.sample(among, 3), own.sample(among, 3)
            return everywhere if common.random() < COMMON else here

        self.described = {noun: three(self.adjectives) for noun in self.nouns}
        self.does = {noun: three(self.verbs) for noun in self.nouns}
        self.done_to = {(verb, at): three(topic) for verb in self.verbs for at, topic in enumerate(self.topics)}

    def document(self, rng: random.Random) -> str:
        at = rng.randrange(len(self.topics))
        subject, sentences = rng.choice(self.topics[at]), []
        for _ in range(rng.randint(5, 11)):
            sentence, seen = self._sentence(subject, at, rng)
            sentences.append(sentence)
            subject = seen if rng.random() < 0.7 else rng.choice(self.topics[at])  # the story goes on with what it met
        return " ".join(sentences)

    def _sentence(self, subject: str, topic: int, rng: random.Random) -> tuple[str, str]:
        verb = self._likely(self.does[subject], self.verbs, rng)
        target = self._likely(self.done_to[verb, topic], self.topics[topic], rng)
        many = rng.random() < 0.4
        parts = {
            "S": self._thing(subject, self.grammar.plural if many else "", rng),
            "V": verb + (self.grammar.agreeing if many else ""),
            "O": self._thing(target, self.grammar.object_ending, rng),
        }
        return " ".join(parts[part] for part in self.grammar.order) + ".", target

    def _thing(self, noun: str, ending: str, rng: random.Random) -> str:
        if rng.random() < 0.5:
            return noun + ending
        adjective = self._likely(self.described[noun], self.adjectives, rng)
        both = (adjective, noun + ending) if self.grammar.adjective_first else (noun + ending, adjective)
        return " ".join(both)

    def _likely(self, few: list[str], all_of_them: list[str], rng: random.Random) -> str:
        return rng.choice(all_of_them) if rng.random() < CHANCE else rng.choices(few, LIKELY)[0]


def write_languages(folder: Path) -> None:
    """<name>.jsonl to train on and <name>_held_out.jsonl, no document in both: the same bytes everywhere."""
    for name in LANGUAGES:
        language, rng, seen = Language(name), random.Random(f"documents of {name}"), dict[str, None]()
        while len(seen) < TRAINED + HELD_OUT:
            seen[language.document(rng)] = None
        lines = [json.dumps({"text": text}) + "\n" for text in seen]
        (folder / f"{name}_held_out.jsonl").write_text("".join(lines[:HELD_OUT]))
        (folder / f"{name}.jsonl").write_text("".join(lines[HELD_OUT:]))
