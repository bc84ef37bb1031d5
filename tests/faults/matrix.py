"""The fault matrix, written by the run of the tests that prove it: pytest --fault-matrix=docs/fault_matrix.md

A test says what it proves by @pytest.mark.fault("F3", "how it is injected", "what comes of it"), and through `told`
what it has found. Tests outside this folder are named in elsewhere.py.
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from phased_cpt import __version__
from tests.faults.elsewhere import ELSEWHERE

FAULTS = {
    "F1": "killed while the data is prepared",
    "F2": "killed in a step",
    "F3": "killed while it saves",
    "F4": "killed between phases, and while it publishes",
    "F5": "killed while it merges",
    "F6": "killed at every file operation in turn",
    "F7": "killed again and again, at random",
    "F8": "asked to stop (SIGTERM), wherever it is",
    "F9": "asked twice; SIGINT; SIGHUP",
    "F10": "only the launcher is stopped or killed",
    "F11": "one rank is killed",
    "F12": "one rank stands still",
    "F13": "the ranks hear of a stop in different steps",
    "F14": "the disk is full",
    "F15": "a folder that cannot be written to",
    "F16": "a checkpoint is damaged",
    "F17": "the record, published weights or the cache are damaged",
    "F18": "a pickle lies in a checkpoint",
    "F19": "configuration, data, base or tokenizer have changed",
    "F20": "another number of ranks, another ZeRO stage",
    "F21": "two at once in one folder; a rank that outlives its run",
    "F22": "called again when all is done",
    "F23": "the clock went back, file times are shuffled",
    "F24": "numbers that are none",
    "F25": "out of memory",
    "F26": "bad input",
    "F27": "a secret in what is written or told",
    "F28": "what fails always is tried again",
    "F29": "the run folder has moved",
    "F30": "a folder of another version",
    "F31": "a node dies, stands still, or is cut off",
    "F32": "nodes or ranks with other code, or another configuration",
    "F33": "a port that is taken; a wrong file of machines",
}
INEXACT = """\
## What is not exact, and what holds instead

| what | what holds | proof |
|---|---|---|
| another number of ranks, or another ZeRO stage, under a half-done phase | the same blocks in the same steps, the same \
learning rate; losses within 1e-3 of their size, because sums are rounded in another order; `run.json` records it | F20 |
| another version of a library, another kernel, another micro batch, under a half-done phase | it goes on; `run.json` \
records it | F19 |
| GPU: kernels without deterministic algorithms | nothing of this run says anything about it: not run here | none |
| TensorBoard files | steps that were done again stand in them twice; `train.jsonl` has each once | E2 |
| power loss | not simulated: a SIGKILL keeps the page cache; every seal is fsynced before its name | by reading |
"""


@dataclass
class Proof:
    """One test that has run."""

    nodeid: str
    how: str
    verdict: str
    outcome: str
    seconds: float
    cases: int
    told: list[str]


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Matrix:
    """What the reports say, fault by fault."""

    path: Path
    made_of: str  # read at the beginning: that is what runs
    rows: Sequence[str] = ()  # of these faults alone; the others stay as an earlier run has written them
    proofs: dict[str, list[Proof]] = field(default_factory=lambda: {fault: [] for fault in FAULTS})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        for name, value in report.user_properties:
            if name == "fault" and isinstance(value, tuple):
                self._add(report, *value)

    def _add(self, report: pytest.TestReport, fault: str, how: str, verdict: str) -> None:
        found = [value for name, value in report.user_properties if name == "told" and isinstance(value, tuple)]
        cases = sum(int(cases) for _, cases in found) or 1
        outcome = report.outcome if not hasattr(report, "wasxfail") else f"expected to fail: {report.wasxfail}"
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            outcome = f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
        words = [str(words) for words, _ in found]
        self.proofs[fault].append(Proof(report.nodeid, how, verdict, outcome, report.duration, cases, words))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # a run that was broken off has nothing to say
        before = self._with_new_rows(self.path.read_text().splitlines()) if self.rows else []
        self.path.write_text("\n".join(self._kept(before) if before else self._page()))

    def _with_new_rows(self, before: list[str]) -> list[str]:
        """With a line for each row that the page does not have yet."""
        last = max(at for at, line in enumerate(before) if line.startswith("| F"))
        there = {line.split()[1] for line in before if line.startswith("| F")}
        new = [self._row(fault, []) for fault in self.rows if fault not in there]
        return [*before[: last + 1], *new, *before[last + 1 :]]

    def _kept(self, before: list[str]) -> Iterator[str]:
        """The page as it was, but for some rows and what their tests have told."""
        mine = {f"| {fault} |" for fault in self.rows} | {f"- {fault} `" for fault in self.rows}
        made_of = f"{', '.join(self.rows)}: {self.made_of}"
        for line in before:
            start = line[: line.find("|", 2) + 1] or line[: line.find("`") + 1]
            if line.startswith("| | fault"):
                yield f"{made_of}\n"
            if start in mine and line.startswith("|"):
                fault = line.split()[1]
                yield self._row(fault, self.proofs[fault])
            elif start not in mine and not line.startswith(f"{', '.join(self.rows)}: "):
                yield line
            if line.startswith("## What each test has told"):
                yield ""
                yield from (
                    f"- {at} `{each.nodeid}`: {words}"
                    for at in self.rows
                    for each in self.proofs[at]
                    for words in each.told
                )

    def _page(self) -> Iterator[str]:
        yield "# The fault matrix\n"
        yield "Written by `make test-faults` itself: do not edit. The faults are those of the plan; what they must end in"
        yield "is criterion E of `tests/faults/criterion.py`: the bytes, figures and files of a run that was never"
        yield "disturbed, with no tolerance.\n"
        yield f"{self.made_of}\n"
        yield "| | fault | how it is injected | cases | what came of it | seconds |"
        yield "|---|---|---|---|---|---|"
        yield from (self._row(fault, proofs) for fault, proofs in self.proofs.items())
        yield ""
        yield INEXACT
        yield "## What each test has told\n"
        for fault, proofs in self.proofs.items():
            for proof in proofs:
                yield from (f"- {fault} `{proof.nodeid}`: {words}" for words in proof.told)
        yield ""

    def _row(self, fault: str, proofs: list[Proof]) -> str:
        if not proofs:
            return f"| {fault} | {FAULTS[fault]} | | 0 | **no test in this run** | |"
        verdicts = [*dict.fromkeys(proof.verdict for proof in proofs if proof.outcome == "passed")]
        failed = [proof.nodeid for proof in proofs if proof.outcome == "failed"]
        other = [proof.outcome for proof in proofs if proof.outcome not in ("passed", "failed")]
        verdicts += [f"**failed: {len(failed)} of {len(proofs)} tests** ({failed[0]})"] if failed else []
        verdicts += dict.fromkeys(f"**{words}**" for words in other)
        how = "; ".join(dict.fromkeys(proof.how for proof in proofs))
        cases, seconds = sum(proof.cases for proof in proofs), sum(proof.seconds for proof in proofs)
        return f"| {fault} | {FAULTS[fault]} | {how} | {cases:,} | {'; '.join(verdicts)} | {seconds:.0f} |"


def _when_and_where() -> str:
    names = ("torch", "transformers", "peft", "accelerate", "deepspeed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    commit = _git("rev-parse", "--short", "HEAD") + (" and changes" if _git("status", "--porcelain") else "")
    day, cores = datetime.now(UTC).strftime("%Y-%m-%d"), len(os.sched_getaffinity(0))
    made_of = f"phased_cpt {__version__}, commit {commit}, Python {platform.python_version()}, {versions}"
    return f"{day}; CPU ({cores} cores), gloo, no GPU; {made_of}."


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


# What pytest calls ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-matrix", type=Path, metavar="FILE", help="write which faults this run has proven")
    parser.addoption("--fault-rows", default="", metavar="F5,…", help="these rows of it alone; the others stay")


def _matrix(path: Path, rows: str) -> Matrix:
    return Matrix(path.resolve(), _when_and_where(), rows=[row for row in rows.split(",") if row])


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--fault-matrix"):
        config.pluginmanager.register(_matrix(path, config.getoption("--fault-rows")))


@pytest.hookimpl(tryfirst=True)  # before those that -m does not want are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for proof in ELSEWHERE.get(item.nodeid.partition("[")[0], ()):
            item.add_marker(pytest.mark.fault(*proof))
        for marker in item.iter_markers("fault"):
            fault, how, verdict = marker.args
            assert fault in FAULTS, f"{item.nodeid}: there is no fault {fault}"
            item.user_properties.append(("fault", (fault, how, verdict)))


@pytest.fixture
def told(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Say what was found, and in how many cases."""

    def tell(words: str, cases: int = 1) -> None:
        request.node.user_properties.append(("told", (words, cases)))

    return tell
