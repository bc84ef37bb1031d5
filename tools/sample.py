"""Makes the small real data set in dataset/sample: this project's own files, commits and reviews, and their tokenizer.

    python tools/sample.py

Everything is read from one commit through git, so later commits change no byte: phase 1 holds the files as they were,
phase 2 the commits up to there, oldest first, phase 3 the reviews of tools/sample_reviews.md below what they speak of.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from phased_cpt.data.train_tokenizer import files_of, trained, words_of_gpt2

COMMIT = "62e1903a3f301e2e713e6404e2ee746ab75f90e1"
REPOSITORY = Path(__file__).resolve().parents[1]
REVIEWS = REPOSITORY / "tools/sample_reviews.md"
SAMPLE = REPOSITORY / "dataset/sample"

FILES = re.compile(r"(phased_cpt|tools|docs/decisions|configs)/.*\.(py|md|yaml)|deepspeed_configs/README\.md"
                   r"|[A-Z]\w+\.md|Makefile|pyproject\.toml"
                   r"|tests/(conftest|test_(schedule|run_dir))\.py|tests/ledger/test_[cfl]\w+\.py")  # fmt: skip
# Made by programs, or full of words that only look like secrets.
SKIPPED = {"LICENSE", "configs/schema.json", "docs/configuration.md", "constraints.txt", "tests/config/test_secrets.py"}
MOST_OF_A_COMMIT, MOST_OF_A_REVIEW = 9_500, 3_000  # characters

Record = dict[str, object]


def git(*arguments: str) -> str:
    """What git says, whatever the user's own settings are."""
    plain = ["core.quotePath=false", "diff.algorithm=myers", "diff.noprefix=false", "diff.mnemonicPrefix=false"]
    settings = [word for setting in plain for word in ("-c", setting)]
    return subprocess.run(
        ["git", *settings, *arguments], cwd=REPOSITORY, check=True, capture_output=True
    ).stdout.decode()


def files() -> Iterator[Record]:
    for path in git("ls-tree", "-r", "--name-only", COMMIT).splitlines():
        text = git("show", f"{COMMIT}:{path}")
        if FILES.fullmatch(path) and path not in SKIPPED and text:
            named = "" if path.endswith(".md") else f"# {path}\n"
            yield {"training_content": named + text, "type": "file", "path": path}


def commits() -> Iterator[Record]:
    """The whole files of a diff that fit, those of the package first; the record says which."""
    for sha in git("rev-list", "--reverse", COMMIT).split():
        message = git("log", "-1", "--format=%B", sha).strip()
        text, held = f"{message}\n\n", []
        for path, diff in sorted(diffs(sha).items(), key=lambda item: not item[0].startswith("phased_cpt/")):
            if path not in SKIPPED and len(text) + len(diff) <= MOST_OF_A_COMMIT:
                text, held = text + diff, [*held, path]
        yield {"training_content": text, "type": "commit", "commit": sha, "paths": held}


def diffs(sha: str) -> dict[str, str]:
    """The diff of each file of a commit. Without the index lines: git makes them longer as the repository grows."""
    whole = git("show", "--format=", "--no-color", "--no-ext-diff", "-U3", "-M", sha)
    parts = re.split(r"^(?=diff --git )", re.sub(r"^index .*\n", "", whole, flags=re.MULTILINE), flags=re.MULTILINE)
    return {part.partition("\n")[0].rpartition(" b/")[2]: part for part in parts if part}


def reviews() -> Iterator[Record]:
    for section in re.split(r"^## ", REVIEWS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, place, review = section.split("\n", 2)
        short, path = head.split()
        sha, title = git("log", "-1", "--format=%H%n%s", short).splitlines()
        part = excerpt(diffs(sha)[path], *place.removeprefix("@ ").split(" … "))
        if len(part) > MOST_OF_A_REVIEW:
            raise ValueError(f"{head}: {len(part)} characters of diff, at most {MOST_OF_A_REVIEW}")
        text = f"{title}\n\n{part}\n\nReview:\n{review.strip()}\n"
        yield {"training_content": text, "type": "review", "commit": sha, "path": path}


def excerpt(diff: str, first: str, last: str) -> str:
    """The lines of a diff from one that holds `first` to one that holds `last`, as hunks with headers of their own."""
    head, *lines = re.split(r"\n(?=@@ )", diff, maxsplit=1)
    rows = list(numbered("".join(lines)))
    begin = next(at for at, (_, _, _, line) in enumerate(rows) if first in line)
    end = next(at for at, (_, _, _, line) in enumerate(rows) if at >= begin and last in line)
    hunks = [list(group) for _, group in groupby(rows[begin : end + 1], key=lambda row: row[0])]
    return "\n".join([head, *map(hunk, hunks)])


def numbered(body: str) -> Iterator[tuple[int, int, int, str]]:
    """Each line of the hunks: the number of its hunk, its line in the old file and in the new one, and itself."""
    number = old = new = 0
    for line in body.split("\n"):
        if found := re.match(r"@@ -(\d+)(?:,\d+)? \+(\d+)", line):
            number, old, new = number + 1, int(found[1]), int(found[2])
        else:
            yield number, old, new, line
            old, new = old + (line[:1] in " -"), new + (line[:1] in " +")


def hunk(rows: list[tuple[int, int, int, str]]) -> str:
    (_, old, new, _), lines = rows[0], [line for *_, line in rows]
    before, after = (sum(line[:1] in signs for line in lines) for signs in (" -", " +"))
    return "\n".join([f"@@ -{old},{before} +{new},{after} @@", *lines])


def main() -> None:
    SAMPLE.mkdir(parents=True, exist_ok=True)
    phases = {"phase1_foundation": files(), "phase2_evolution": commits(), "phase3_pr_mastery": reviews()}
    texts: list[str] = []
    for name, made in phases.items():
        records = list(made)
        texts += [str(record["training_content"]) for record in records]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (SAMPLE / f"{name}.jsonl").write_bytes(lines.encode())
    # As GPT-2 splits words: the figures of README and benchmarks were measured with these very ids.
    tokenizer = trained(texts, 4096, words_of_gpt2())
    for name, content in files_of(tokenizer, model_max_length=1024).items():
        (SAMPLE / name).write_bytes(content)


if __name__ == "__main__":
    main()
