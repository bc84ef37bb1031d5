"""report.html: what stands in it, what may be missing or damaged, and that nothing of a text becomes markup."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.errors import PhasedCptError
from phased_cpt.report import write_report
from phased_cpt.report.page import PARTS, templates
from phased_cpt.run_dir import RunDir
from tests.conftest import REPOSITORY, Call
from tests.report.folders import DATA, SAMPLES, evaluation, folder, phase, record, step, two_phases

DAMAGED = "cannot be shown"


class Read(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(run_dir: RunDir) -> str:
    return write_report(run_dir).read_text()


# What stands in it ----------------------------------------------------------------------------------------------------


def test_a_report_holds_every_part_of_a_run(tmp_path: Path) -> None:
    page = page_of(two_phases(tmp_path / "run"))
    text = Read(page).text
    for expected in (
        "tales", "Finished", "some/model",  # the head
        "Most was forgotten of foundation: its loss stands 0.100 nats above its best (after foundation).",
        "foundation done · 8.0 s · 400 tokens",  # the timeline
        "1 foundation 3.200 2.900 −0.300 24.5 18.2 100 step 4 of 4",  # before and after
        "foundation 2.900 −0.300 3.900 −0.100 –",  # a row of the matrix
        "foundation 3.200 2.900 foundation 3.000 −0.100 – +0.100 –",  # its measures
        "wiki never trained 5.000 5.000 base 5.200 – – – +0.200",
        "evolution foundation 2.850 +0.150",  # its control
        "Measuring all this took 12 s, 4.0% of the time of training.",
        "evolution did not hold +0.100 0.05 foundation – no limit warn",  # the gate
        "1 foundation 85 3 900 800 15 60 40 0 96.0%",  # the tokens
        "def add(a, b): base zq zq foundation b) -> int:",  # the samples
        "started from base cdcdcdcdcdcd published base cdcdcdcdcdcd + adapter abababababab step 4 of 4, lowest",
        "1 of 2 values were set",
        "seed: 7 run.yaml:3",
    ):  # fmt: skip
        assert expected in text, expected
    assert DAMAGED not in text
    assert "evolution did not hold" not in Read(page_of(two_phases(tmp_path / "other", **{"run.json": "{"}))).text


def test_a_run_without_the_newer_files_says_what_is_not_there(tmp_path: Path) -> None:
    run = folder(tmp_path, {"run.json": record(phase(1, "foundation"))})
    text = Read(page_of(run)).text
    for said in (
        "There is no forgetting.json in this run",
        "No step has been logged yet",
        "No samples have been written",
    ):
        assert said in text
    assert DAMAGED not in text
    assert "Gates" not in text


def test_a_run_under_way_says_how_far_it_is(tmp_path: Path) -> None:
    run = folder(
        tmp_path,
        {
            "run.json": record(phase(1, "foundation", "running"), phase(2, "evolution", "pending", started=None)),
            "phase1_foundation/logs/train.jsonl": [step(1, 3.5, 241), step(2, 3.4, 242)],
            "phase1_foundation/logs/eval.jsonl": [evaluation(0, 3.6), evaluation(2, 3.3)],
        },
    )
    text = Read(page_of(run)).text
    assert "Interrupted in phase 1 of 2, foundation, step 2 of 4" in text
    assert "1 foundation 3.600 3.300 −0.300 – – 100 so far" in text
    assert "There is no forgetting.json yet" in text
    assert DAMAGED not in text


def test_a_phase_whose_gate_has_stopped_the_run_is_told_from_its_folder(tmp_path: Path) -> None:
    gate = {"min_gain": 0.1, "gain": 0.01, "passed": False, "on_fail": "stop"}
    files = {"run.json": record(phase(1, "foundation", "running")), "phase1_foundation/gate.json": gate}
    assert "foundation did not hold – no limit +0.010 0.1 stop" in Read(page_of(folder(tmp_path, files))).text


def test_a_restart_is_told_with_what_was_other_than_before(tmp_path: Path) -> None:
    first = {"started": "2026-01-02T03:00:00+00:00", "host": "here", "pid": 1, "version": "1.0"}
    second = first | {
        "started": "2026-01-02T05:00:00+00:00",
        "resumed": {"foundation": 25},
        "differences": {"launch.num_gpus": [2, 4]},
        "inexact": {"foundation.ranks": [2, 4]},
    }
    text = Read(page_of(folder(tmp_path, {"run.json": record(phase(1, "foundation"), attempts=[first, second])}))).text
    assert "foundation from step 25" in text
    assert "launch.num_gpus 2 → 4" in text
    assert "not to the same bits: foundation.ranks 2 → 4" in text


def test_replay_shows_its_shares(tmp_path: Path) -> None:
    own = {"source": "new.jsonl", "planned_share": 0.95, "share": 0.9501, "tokens": 760, "epochs": 1.5}
    old = {"phase": "foundation", "planned_share": 0.05, "share": 0.0499, "tokens": 40, "epochs": 0.25}
    drawn = {"phase2_evolution/data.json": DATA | {"mixture": [own], "replay": [old]}}
    text = Read(page_of(two_phases(tmp_path / "replayed", **drawn))).text
    assert "2 evolution new.jsonl 95.00% 95.01% 760 1.50 2 evolution foundation (replay) 5.00% 4.99% 40 0.25" in text
    alone = {"phase2_evolution/data.json": DATA | {"mixture": [own], "replay": []}}
    assert "Where its tokens come from" not in Read(page_of(two_phases(tmp_path / "alone", **alone))).text


def test_what_was_handed_over_stands_in_the_lineage(tmp_path: Path) -> None:
    merged = {"kind": "base", "base": "ef" * 32, "folder": "phase1_foundation/next_base"}
    run = folder(tmp_path, {"run.json": record(phase(1, "foundation", handed_over=merged))})
    assert "handed over base efefefefefef phase1_foundation/next_base" in Read(page_of(run)).text


def test_a_report_goes_where_it_is_asked_to_and_replaces_the_old_one_whole(tmp_path: Path) -> None:
    run, elsewhere = two_phases(tmp_path / "run"), tmp_path / "new" / "page.html"
    assert write_report(run, elsewhere) == elsewhere
    assert not (run.root / "report.html").exists()
    elsewhere.write_text("old")
    write_report(run, elsewhere)
    assert elsewhere.read_text().startswith("<!doctype html>")
    assert [path.name for path in elsewhere.parent.iterdir()] == ["page.html"]


# Nothing from a text becomes markup, and nothing is asked for --------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>\"'><style>*{}</style>"


def evil(value: Any) -> Any:
    """The same tree with every free text replaced; names of phases and states stay, for others refer to them."""
    if isinstance(value, dict):
        kept = (
            "name",
            "state",
            "folder",
            "after",
            "kind",
            "dataset",
            "ts",
            "started",
            "finished",
            "created",
            "best_after",
        )
        return {key: each if key in kept else evil(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [evil(each) for each in value]
    return EVIL if isinstance(value, str) else value


def evil_run(root: Path) -> RunDir:
    run = two_phases(root)
    for path in (*root.rglob("*.json"), *root.rglob("*.yaml")):
        content = path.read_text()
        path.write_text(
            json.dumps(evil(json.loads(content))) if path.suffix == ".json" else f"run:\n  a: {EVIL}  # {EVIL}\n"
        )
    told = json.loads(run.ledger.read_text())
    told["name"] = told["phases"][1]["name"] = EVIL
    told["phases"][0]["published"]["kind"] = told["phases"][0]["started_from"]["kind"] = "base"
    told["phases"][1]["started_from"]["kind"] = "base"
    told["config"] = {"phases": [{"name": "foundation", "description": EVIL}]}
    run.ledger.write_text(json.dumps(told))
    forgetting = json.loads((root / "forgetting.json").read_text())
    forgetting["sets"].append({"name": EVIL, "kind": "general", "tokens": 1})
    forgetting["rows"].append({"after": EVIL, "losses": {EVIL: 1.0}})
    (root / "forgetting.json").write_text(json.dumps(forgetting))
    return run


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    harmless, page = page_of(two_phases(tmp_path / "harmless")), page_of(evil_run(tmp_path / "evil"))
    assert Read(page).tags() <= Read(harmless).tags() | {"svg"}
    assert Read(page).tags().isdisjoint({"script", "img", "iframe", "object"})
    assert page.count("<style>") == 1
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10  # it is there, as a text
    assert DAMAGED not in page


def test_the_check_for_markup_would_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    careless = templates().overlay(autoescape=False)
    monkeypatch.setattr("phased_cpt.report.page.templates", lambda: careless)
    assert {"script", "img"} <= Read(page_of(evil_run(tmp_path))).tags()


def test_a_report_asks_for_nothing(tmp_path: Path) -> None:
    page = page_of(two_phases(tmp_path))
    found = Read(page)
    for tag, attributes in found.elements:
        assert not {"src", "srcset", "data", "action", "ping", "style", "background"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert found.tags().isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    assert not re.search(r"@import|url\((?!#)|https?:", page)
    policy = next(each for tag, each in found.elements if each.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'; style-src 'sha256-")


def test_secrets_and_odd_characters_of_texts_do_not_reach_the_page(tmp_path: Path) -> None:
    said = {**SAMPLES, "after": ["key hf_" + "a" * 30 + " \x00\x1b[31m \ud83d end"]}
    page = page_of(two_phases(tmp_path, **{"phase1_foundation/samples.json": said}))
    assert "key &lt;secret&gt; ␀␛[31m ? end" in page
    assert "hf_aaa" not in page


# Whatever a folder holds ----------------------------------------------------------------------------------------------

FILES = sorted(str(path) for path in (
    Path("run.json"), Path("config_resolved.yaml"), Path("forgetting.json"),
    *(Path("phase1_foundation") / name for name in (
        "best_adapter/source.json", "data.json", "samples.json", "logs/train.jsonl", "logs/eval.jsonl",
    )),
))  # fmt: skip
STRANGE: dict[str, bytes] = {
    "empty": b"", "torn": b'{"phases": [{"na', "a list": b"[1, 2]", "a text": b'"run"', "not UTF-8": b"\xff\xfe{",
    "deep": b"[" * 100_000, "null": b"null", "an empty object": b"{}",
    "odd values": b'{"rows": 3, "sets": [{"name": null}], "prompts": [1], "splits": [], "start": 4, "step": "x", "end": "y"}',
    "not finite": b'{"step": NaN, "steps": Infinity, "tokens": -Infinity, "seconds": 1e999, "start": {"eval_loss": NaN}}',
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), list(itertools.product(FILES, STRANGE)))
def test_a_damaged_file_costs_its_own_part_at_most(tmp_path: Path, name: str, content: str) -> None:
    page = page_of(two_phases(tmp_path, **{name: STRANGE[content]}))
    assert page.count(DAMAGED) <= 2
    assert page.rstrip().endswith("</html>")
    parts = Read(page).text
    assert sum(heading in parts for heading in ("The curriculum", "Lineage", "Attempts", "Configuration")) == 4


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    page = page_of(two_phases(tmp_path, **{"phase1_foundation/samples.json": "{"}))
    assert "phase1_foundation/samples.json: damaged; what it would tell is missing here." in page
    assert "damaged" not in page_of(two_phases(tmp_path / "whole"))


def test_a_part_that_fails_is_a_sentence_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Any) -> Any:
        raise KeyError("gone")

    monkeypatch.setitem(PARTS, "lineage", fails)
    text = Read(page_of(two_phases(tmp_path))).text
    assert "Lineage This part cannot be shown: a file of the run folder holds something else" in text
    assert "Attempts" in text


def test_folders_in_place_of_files_and_a_file_in_place_of_a_phase_are_no_reason_to_fail(tmp_path: Path) -> None:
    run = two_phases(tmp_path)
    for name in ("forgetting.json", "config_resolved.yaml", "phase1_foundation/data.json"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    page = page_of(run)
    assert "forgetting.json: cannot be read: Is a directory." in page


def test_a_file_system_without_locks_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def holder_of(run_dir: RunDir) -> None:
        raise PhasedCptError("run.lock: this file system cannot lock files")

    monkeypatch.setattr("phased_cpt.report.folder.holder_of", holder_of)
    assert "this file system cannot lock files" in page_of(two_phases(tmp_path))


def test_without_a_ledger_the_phases_are_read_from_their_folders(tmp_path: Path) -> None:
    run = two_phases(tmp_path)
    run.ledger.unlink()
    assert "1 foundation 3.200 2.900 −0.300" in Read(page_of(run)).text


def test_every_part_of_the_page_has_its_template_and_every_template_its_part() -> None:
    templates = {path.stem for path in (REPOSITORY / "phased_cpt" / "report" / "pages").glob("*.html")}
    assert templates == {*PARTS, "page", "summary", "damaged"}


# The verb -------------------------------------------------------------------------------------------------------------


def test_the_verb_writes_the_page_and_says_where(tmp_path: Path, call: Call) -> None:
    run = two_phases(tmp_path / "run")
    answer = call("report", "--run-dir", str(run.root))
    assert (answer.code, answer.out) == (0, f"{run.root / 'report.html'}\n")
    assert (run.root / "report.html").read_text().startswith("<!doctype html>")
    assert (
        call("report", "--run-dir", str(run.root), "--out", str(tmp_path / "x.html")).out == f"{tmp_path / 'x.html'}\n"
    )


def test_the_verb_refuses_what_is_no_run(tmp_path: Path, call: Call) -> None:
    (tmp_path / "holiday").mkdir()
    answer = call("report", "--run-dir", str(tmp_path / "holiday"))
    assert (answer.code, answer.err) == (
        2, f"{tmp_path / 'holiday'}: no run has begun here; name another folder with --run-dir\n",
    )  # fmt: skip
    assert not list((tmp_path / "holiday").iterdir())
    assert "no such run folder" in call("report", "--run-dir", str(tmp_path / "nowhere")).err
    run = two_phases(tmp_path / "run")
    answer = call("report", "--run-dir", str(run.root), "--out", str(tmp_path))
    assert (answer.code, answer.err) == (
        2,
        f"--out {tmp_path}: this is a folder; name the file, {tmp_path}/report.html perhaps\n",
    )
