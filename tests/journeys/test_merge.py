"""What a run ends in: one plain model, which is base and last phase; there already, it is not made again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from phased_cpt import merging
from phased_cpt.blend import merge_published
from phased_cpt.ledger import read_record
from phased_cpt.merging import MergeJob
from phased_cpt.run_dir import RunDir
from tests.conftest import REPOSITORY, Call
from tests.journeys.conftest import Ran, Tiny, planned
from tests.journeys.test_publishing import MustNotTrain
from tests.journeys.test_stops import children_of, is_alive
from tests.zygote import Zygote

HERE = "tests.journeys.test_merge"
MERGED = Path("run/merged_model")
EXACT = 1e-5
ON = {"merge": {"enabled": True}}


def two(tiny: Tiny, **sections: Any) -> dict[str, Any]:
    """Two phases of two steps, with a rate that moves something."""
    config = tiny(**{"training": {"learning_rate": 0.01}, **sections})
    return config | {"phases": [phase | {"max_steps": 2} for phase in config["phases"][:2]]}


# In the zygote ----------------------------------------------------------------------------------------------------------


def merges(job: str) -> None:
    """What the child does, without its imports."""
    from phased_cpt.data.watch import Unwatched
    from phased_cpt.merge.story import merge

    merge(MergeJob.parse(job), Unwatched())


def compared(merged: str, run: str, phase: str | None) -> dict[str, float]:
    """How far a merged model is from what a phase has published, and that from its base: of the largest logit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from phased_cpt.model.reload import load_published

    torch.set_num_threads(1)
    model, loading = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    published, tokenizer = load_published(run, phase)
    base = AutoModelForCausalLM.from_pretrained(f"{run}/random_base")
    ids = AutoTokenizer.from_pretrained(merged)("def main():\n    return the_answer", return_tensors="pt").input_ids
    assert ids.tolist() == tokenizer("def main():\n    return the_answer", return_tensors="pt").input_ids.tolist()

    @torch.no_grad()
    def logits(each: Any) -> Any:
        return each.eval()(ids, use_cache=False).logits.float()

    wanted, largest = logits(published), float(logits(published).abs().max())
    return {
        "off": float((logits(model) - wanted).abs().max()) / largest,
        "base": float((logits(base) - wanted).abs().max()) / largest,
        "odd keys": float(sum(map(len, loading.values()))),
    }


# Here -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def merged_quickly(zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Children that need no imports; where to, of each."""
    seen: list[str] = []

    def run(job: MergeJob) -> None:
        seen.append(Path(job.output).name)
        zygote.call(f"{HERE}:merges", json.dumps(asdict(job)), folder=tmp_path / "child")

    (tmp_path / "child").mkdir()
    monkeypatch.setattr(merging, "_run", run)
    return seen


Off = Callable[..., float]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def trained(tiny: Tiny, ran: Ran, kept: Path) -> Callable[..., dict[str, Any]]:
    """Two phases, trained once for all that only merge them; and their configuration."""

    def once(**sections: Any) -> dict[str, Any]:
        if not kept.exists():
            ran(two(tiny))
            shutil.copytree("run", kept)
        shutil.copytree(kept, "run", dirs_exist_ok=True)
        return two(tiny, **sections)

    return once


@pytest.fixture
def off(zygote: Zygote, tmp_path: Path) -> Off:
    """How far the merged model is from what is published; nearly nothing, but the base is far from both."""

    def measured(merged: str = "run/merged_model", phase: str | None = None) -> float:
        found = zygote.call(f"{HERE}:compared", str(Path(merged).resolve()), str(Path("run").resolve()), phase, folder=tmp_path)  # fmt: skip
        assert found["base"] > 0.01, "the control: something was trained"
        assert not found["odd keys"]
        return float(found["off"])

    return measured


def files(folder: Path) -> dict[str, tuple[int, int, int]]:
    stats = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {str(path): (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in stats}


@pytest.mark.requirement("M-01", "M-04")
def test_a_run_ends_in_a_merged_model_and_calls_that_find_it_leave_it(
    trained: Callable[..., dict[str, Any]], ran: Ran, off: Off
) -> None:
    """By a child of its own, as it is for people."""
    config = trained(**ON)
    assert ran(config).finished
    assert off() <= EXACT
    card, facts = (MERGED / "README.md").read_text(), json.loads((MERGED / "merge.json").read_text())
    assert "| 1 | foundation |" in card and "| 2 | evolution |" in card and "# tiny" in card
    assert facts["logits"]["of"] == "held-out documents" and facts["logits"]["exact"]
    [weights] = read_record(RunDir(Path("run"))).phases[-1].published.adapters  # type: ignore[union-attr]
    assert [each["digest"] for each in facts["adapters"]] == [weights.digest]
    before = files(MERGED)
    assert ran(config, door=MustNotTrain()).trained == ()
    assert files(MERGED) == before
    assert not list(Path("run").glob(".merged_model*"))


@pytest.mark.requirement("M-04")
def test_the_last_phase_redone_is_merged_anew_and_the_old_one_archived(
    trained: Callable[..., dict[str, Any]], ran: Ran, merged_quickly: list[str], off: Off
) -> None:
    config = trained(**ON)
    ran(config)
    first = (MERGED / "model.safetensors").read_bytes()
    config["phases"][1]["training"] = {"learning_rate": 0.02}
    assert ran(config, redo_from="evolution").trained == ("evolution",)
    assert merged_quickly == ["merged_model"] * 2
    assert off() <= EXACT
    [archived] = Path("run/archive").glob("*/merged_model/model.safetensors")
    assert archived.read_bytes() == first
    assert (MERGED / "model.safetensors").read_bytes() != first


def test_only_a_whole_run_is_merged_and_only_where_it_is_wanted(
    tiny: Tiny, trained: Callable[..., dict[str, Any]], ran: Ran, merged_quickly: list[str], call: Call
) -> None:
    answer = call("merge", "--run-dir", "run")
    assert answer.code == 2 and "Traceback" not in answer.err, "nothing was trained yet"
    ran(two(tiny, **ON), last="foundation")
    assert not MERGED.exists() and not merged_quickly
    answer = call("merge", "--run-dir", "run")
    assert (answer.code, answer.out) == (2, "")
    assert "foundation is not its last phase" in answer.err and "--out" in answer.err
    shutil.rmtree("run")
    config = trained()
    ran(config, door=MustNotTrain())
    assert not MERGED.exists() and not merged_quickly
    ran(config | ON, door=MustNotTrain())
    assert MERGED.exists() and merged_quickly == ["merged_model"], "nothing is trained again for it"


@pytest.mark.requirement("M-03")
def test_merging_later_by_a_verb_any_phase_and_any_place(
    trained: Callable[..., dict[str, Any]], merged_quickly: list[str], off: Off, call: Call
) -> None:
    config = trained()
    Path("run.json").write_text(json.dumps(config))
    before = files(Path("run/phase2_evolution")) | files(Path("run/phase1_foundation"))

    answer = call("merge", "--run-dir", "run", "--json")
    told = json.loads(answer.out)
    assert answer.code == 0 and told["merged_now"] and Path(told["folder"]) == MERGED.resolve()
    assert off() <= EXACT
    answer = call("run", "-c", "run.json", "--run-dir", "run", "--merge-only")
    assert answer.code == 0 and "nothing to do: merged already" in answer.out

    answer = call("merge", "--run-dir", "run", "--phase", "foundation", "--out", "early")
    assert (answer.code, merged_quickly) == (0, ["merged_model", "early"]), answer.err
    assert off("early", "foundation") <= EXACT
    assert off("early", "evolution") > 100 * EXACT, "the control: phases differ"
    answer = call("merge", "--run-dir", "run", "--out", "small", "--dtype", "bf16", "--max-shard-size", "300KB")
    assert answer.code == 0, answer.err
    shards = [path.stat().st_size for path in Path("small").glob("*.safetensors")]
    assert len(shards) > 2 and json.loads(Path("small/config.json").read_text())["dtype"] == "bfloat16"
    assert EXACT < off("small") < 0.05

    answer = call("merge", "--run-dir", "run", "--phase", "pr_mastery", "--out", "none")
    assert answer.code == 2 and "foundation, evolution have" in answer.err and not Path("none").exists()
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    answer = call("merge", "--run-dir", "run", "--out", "mine")
    assert answer.code == 2 and "holds thesis.txt, which no merge has written" in answer.err
    assert files(Path("run/phase2_evolution")) | files(Path("run/phase1_foundation")) == before


@pytest.mark.requirement("M-02", "M-03")
def test_a_base_that_it_was_not_trained_on_is_refused_and_the_right_one_is_merged(
    trained: Callable[..., dict[str, Any]], merged_quickly: list[str], off: Off, call: Call
) -> None:
    trained()
    shutil.copytree("run/random_base", "other")
    (Path("other") / "source.json").unlink(missing_ok=True)
    content = bytearray(Path("other/model.safetensors").read_bytes())
    content[-1] ^= 1
    Path("other/model.safetensors").write_bytes(content)

    answer = call("merge", "--run-dir", "run", "--base", "other")
    assert answer.code == 4 and "not the base that the run was trained on; name that with --base" in answer.err
    adapter = "run/phase2_evolution/best_adapter"
    answer = call("merge", "--base", "other", "--adapter", adapter, "--out", "out")
    assert answer.code == 2 and "this adapter was trained on another base" in answer.err
    assert not merged_quickly and not Path("out").exists() and not MERGED.exists()

    answer = call("merge", "--base", "run/random_base", "--adapter", adapter, "--out", "out", "--dtype", "fp32", "--json")  # fmt: skip
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["merged_now"] and off("out") <= EXACT
    answer = call("merge", "--base", "run/random_base", "--adapter", adapter, "--out", "out", "--dtype", "fp32")
    assert answer.out.startswith("nothing to do: merged already") and merged_quickly == ["out"]
    for words in (("--adapter", adapter), ("--adapter", adapter, "--base", "run/random_base")):
        answer = call("merge", *words)
        assert answer.code == 2 and "--base MODEL --adapter DIR --out DIR" in answer.err


@pytest.mark.requirement("M-03")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_trained_whole_is_its_masters_in_the_type_that_is_asked_for(
    precision: str, tiny: Tiny, ran: Ran, merged_quickly: list[str], off: Off
) -> None:
    import torch
    from safetensors.torch import load_file

    config = two(tiny, **ON, lora={"enabled": False}, model={"precision": precision})
    ran(config)
    masters = load_file("run/phase2_evolution/best_model/model.safetensors")
    found = load_file(MERGED / "model.safetensors")
    to = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert found.keys() == masters.keys()
    assert all(torch.equal(found[name], masters[name].to(to)) for name in masters)
    base = load_file("run/random_base/model.safetensors")
    assert not any(torch.equal(found[name].float(), base[name]) for name in base if "proj" in name), "the control"
    assert json.loads((MERGED / "merge.json").read_text())["adapters"] == []


# Stopped ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def merging_now(*words: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """The verb as it is typed, and its child as soon as there is one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "phased_cpt", "merge", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (children := [pid for pid in children_of(process.pid) if "phased_cpt.merge" in words_of(pid)]):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        yield process, children[0]
    finally:
        process.kill()
        process.wait()


def words_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.mark.requirement("M-04")
@pytest.mark.fault("F5", "SIGTERM, SIGINT, SIGKILL of the verb while it merges", "75, or killed; nobody is left")
def test_whoever_stops_the_verb_leaves_no_process_and_no_half_model(
    trained: Callable[..., dict[str, Any]], merged_quickly: list[str]
) -> None:
    config = trained()
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -signal.SIGKILL)):
        with merging_now("--run-dir", "run") as (process, child):
            time.sleep(0.5)
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
            assert process.returncode == code, said
            assert gone(child), "somebody is left"
        if code == 75:
            assert "the same command goes on" in said and "Traceback" not in said
        assert not MERGED.exists()
    assert merge_published(planned(config), RunDir(Path("run"))).now, "the lock is free, and it goes on"
