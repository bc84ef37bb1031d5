"""A merge from outside: when it is made, what it may replace, and how its process ends."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from phased_cpt import merging
from phased_cpt.errors import InputError, Interrupted, PhasedCptError
from phased_cpt.merged_folder import read_marker
from phased_cpt.merging import FourBitBase, Layer, MergeJob, merge, merge_folders
from phased_cpt.published import weights_digest

JOB = MergeJob("base", "b", (Layer("one", "1"), Layer("two", "2", 0.5)), "out", "bf16", 2**30)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[MergeJob]:
    """The jobs that a child was started for; it writes a small folder."""
    monkeypatch.chdir(tmp_path)
    jobs: list[MergeJob] = []

    def run(job: MergeJob) -> None:
        jobs.append(job)
        output = Path(job.output)
        output.mkdir(exist_ok=True)
        (output / "model.safetensors").write_bytes(job.digest.encode())
        facts = {"digest": job.digest, "format": 1, "files": {"model.safetensors": {"bytes": len(job.digest)}}}
        (output / "merge.json").write_text(json.dumps(facts))

    monkeypatch.setattr(merging, "_run", run)
    return jobs


def stats(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


# When it is made --------------------------------------------------------------------------------------------------------

KEPT = FourBitBase("bf16", "auto")
OTHERS: dict[str, dict[str, Any]] = {
    "another base": {"base_digest": "c"},
    "another adapter": {"adapters": (Layer("one", "1"), Layer("two", "3", 0.5))},
    "another strength": {"adapters": (Layer("one", "1"), Layer("two", "2", 1.0))},
    "one adapter less": {"adapters": (Layer("one", "1"),)},
    "another order": {"adapters": JOB.adapters[::-1]},
    "another type": {"dtype": "fp32"},
    "another size of files": {"max_shard_size": 2**20},
    "moved towards other weights": {"toward": Layer("whole", "3", 0.5)},
    "moved further": {"toward": Layer("whole", "3", 0.7)},
    "a base in 4 bits": {"four_bits": KEPT},
    "a base in 4 bits, as it is asked for": {"four_bits": KEPT, "base_kind": "dequantized"},
}
THE_SAME: dict[str, dict[str, Any]] = {
    "the base lies elsewhere": {"base": "elsewhere"},
    "the adapters lie elsewhere": {"adapters": (Layer("a", "1"), Layer("b", "2", 0.5))},
    "another history": {"lineage": {"run": "another"}},
    "another text to check it on": {"held_out": "elsewhere"},
    "what only matters in 4 bits": {"base_kind": "dequantized"},
}


@pytest.mark.requirement("M-04")
@pytest.mark.parametrize("change", OTHERS)
def test_what_makes_another_model_is_merged_anew(change: str, children: list[MergeJob]) -> None:
    assert merge(JOB).now
    assert merge(replace(JOB, **OTHERS[change])).now
    assert len(children) == 2


@pytest.mark.requirement("M-04")
@pytest.mark.parametrize("change", ["nothing", *THE_SAME])
def test_what_is_there_already_is_not_touched(change: str, children: list[MergeJob]) -> None:
    merge(JOB)
    before = stats(Path("out"))
    again = merge(replace(JOB, **THE_SAME.get(change, {})))
    assert not again.now and again.facts["digest"] == JOB.digest and again.folder == Path("out")
    assert stats(Path("out")) == before and len(children) == 1


def test_every_job_above_is_another(children: list[MergeJob]) -> None:
    digests = [JOB.digest, *(replace(JOB, **change).digest for change in OTHERS.values())]
    assert len(set(digests)) == len(digests)


DAMAGES: dict[str, Callable[[], object]] = {
    "a file is gone": lambda: Path("out/model.safetensors").unlink(),
    "a file was cut off": lambda: os.truncate("out/model.safetensors", 3),
    "half a merge.json": lambda: Path("out/merge.json").write_text('{"digest'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_again(damage: str, children: list[MergeJob]) -> None:
    merge(JOB)
    DAMAGES[damage]()
    assert merge(JOB).now and len(children) == 2
    assert not merge(JOB).now


def test_a_job_comes_through_json_as_it_was(children: list[MergeJob]) -> None:
    for job in (
        JOB,
        replace(JOB, **OTHERS["moved further"]),
        replace(JOB, **OTHERS["a base in 4 bits"], tokenizer="t", lineage={"phases": [{"a": 1.5}]}),
    ):
        assert MergeJob.parse(json.dumps(asdict(job))) == job


# What it may replace ----------------------------------------------------------------------------------------------------


@pytest.mark.requirement("M-04")
def test_nothing_is_written_over_that_is_no_merged_model(children: list[MergeJob]) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"^out: holds thesis.txt, which no merge has written; name another folder"):
        merge(JOB)
    assert Path("out/thesis.txt").read_text() == "mine" and not children


def test_a_file_of_that_name_is_told(children: list[MergeJob]) -> None:
    Path("out").write_text("mine")
    with pytest.raises(InputError, match=r"^out: this is a file, and a merged model is a folder"):
        merge(JOB)
    assert Path("out").read_text() == "mine" and not children


def test_an_empty_folder_may_be_filled(children: list[MergeJob]) -> None:
    Path("out").mkdir()
    assert merge(JOB).now


def test_a_merge_json_of_another_program_makes_no_folder_ours(children: list[MergeJob]) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    Path("out/merge.json").write_text('{"merge_method": "ties", "models": ["a", "b"]}')
    with pytest.raises(InputError, match=r"^out: holds .*which no merge has written"):
        merge(JOB)


def test_what_somebody_has_put_into_a_merged_model_is_not_deleted(children: list[MergeJob]) -> None:
    merge(JOB)
    Path("out/model.gguf").write_text("an hour's work")
    with pytest.raises(InputError, match=r"^out: holds .*model\.gguf"):
        merge(replace(JOB, dtype="fp32"))


def test_the_output_is_not_the_base(children: list[MergeJob], tmp_path: Path) -> None:
    merge(JOB)
    with pytest.raises(InputError):
        merge(replace(JOB, base=str(tmp_path / "out"), output=str(tmp_path / "out"), base_digest="of-out"))


# How its process ends ---------------------------------------------------------------------------------------------------

ENDS: dict[str, tuple[int, bytes, type[PhasedCptError], int, str]] = {
    "refused": (2, b'{"message": "no such thing", "exit_code": 2}', InputError, 2, "^no such thing$"),
    "stopped": (75, b'{"message": "stopped", "exit_code": 75}', Interrupted, 75, "^stopped$"),
    "failed": (1, b'{"message": "not base and adapter", "exit_code": 1}', PhasedCptError, 1, "^not base and adapter$"),
    "killed": (-signal.SIGKILL, b"", PhasedCptError, 1, "was killed .out of memory.*the same command goes on"),
    "ended by another": (-signal.SIGTERM, b"", PhasedCptError, 1, "has failed .exit -15.; the same command goes on"),
    "half a word": (1, b'{"mess', PhasedCptError, 1, "has failed .exit 1."),
    "nothing said": (0, b"", PhasedCptError, 1, "has failed .exit 0."),
}


@pytest.mark.parametrize("end", ENDS)
def test_how_the_child_has_ended_is_told(end: str) -> None:
    code, said, kind, exit_code, words = ENDS[end]
    with pytest.raises(kind, match=words) as failed:
        merging._judge(code, said)
    assert type(failed.value) is kind and failed.value.exit_code == exit_code
    merging._judge(0, b'{"done": true}\n')


def test_a_child_that_publishes_nothing_is_no_success(children: list[MergeJob], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(merging, "_run", lambda job: None)
    with pytest.raises(PhasedCptError, match="out: the merge has ended without publishing"):
        merge(JOB)
    assert read_marker(Path("out")) is None


def test_the_child_is_no_rank_and_has_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "8", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cuda", "HF_HOME": "/models"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = merging._environment()
    assert not found.keys() & {"RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR"}
    assert found["HF_HOME"] == "/models" and found["PHASED_CPT_CONDUCTOR"] == str(os.getpid())


# Folders ----------------------------------------------------------------------------------------------------------------


def base_at(folder: str, number: float = 1.0) -> Path:
    path = Path(folder)
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": numpy.full(4, number, "f4")}, path / "model.safetensors")
    return path


def adapter_at(folder: str, **source: Any) -> Path:
    path = Path(folder)
    path.mkdir()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": numpy.ones(4, "f4")}, path / "adapter_model.safetensors")
    if source:
        told = {"phase": "one", "fingerprint": "f", "kind": "adapter", "digest": weights_digest(path)}
        told |= {"step": 1, "steps": 1}
        (path / "source.json").write_text(
            json.dumps(told | {"why": "last", "tokens": 1, "seconds": 1.0, "base": "", **source})
        )
    return path


@pytest.mark.requirement("M-03")
def test_any_base_and_adapters_make_a_job(children: list[MergeJob]) -> None:
    base, one, two = base_at("base"), adapter_at("one"), adapter_at("two")
    made = merge_folders("base", [one, two], Path("out"), ["merge.dtype=fp16", "merge.max_shard_size=5MB"], print)
    [job] = children
    assert made.now and job.base == str(base.resolve()) and job.base_digest == weights_digest(base)
    assert [each.folder for each in job.adapters] == [str(one.resolve()), str(two.resolve())]
    assert [each.digest for each in job.adapters] == [weights_digest(one), weights_digest(two)]
    assert (job.dtype, job.max_shard_size, job.four_bits) == ("fp16", 5_000_000, None)
    assert Path(job.output).is_absolute() and job.tokenizer == str(base.resolve())
    (one / "tokenizer_config.json").write_text("{}")
    merge_folders("base", [one, two], Path("elsewhere"), [], print)
    assert children[-1].tokenizer == str(one.resolve()), "the one that the adapter brings, before that of the base"


@pytest.mark.requirement("M-02")
def test_an_adapter_of_ours_knows_its_base(children: list[MergeJob]) -> None:
    digest = weights_digest(base_at("base"))
    base_at("other", 2.0)
    adapter = adapter_at("ours", base=digest)
    with pytest.raises(InputError, match=rf"ours: this adapter was trained on another base than .*other .digest {digest[:12]}"):  # fmt: skip
        merge_folders("other", [adapter], Path("out"), [], print)
    assert not children and not Path("out").exists()
    merge_folders("base", [adapter], Path("out"), [], print)
    merge_folders("other", [adapter_at("of nobody")], Path("another"), [], print)
    assert len(children) == 2


def test_an_adapter_of_ours_that_was_damaged_is_refused(children: list[MergeJob]) -> None:
    """The checks of a merge would pass: both of their sides have the damage."""
    digest = weights_digest(base_at("base"))
    adapter = adapter_at("ours", base=digest)
    save_file({"x": numpy.zeros(4, "f4")}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="ours: the weights are not what was published; restore them"):
        merge_folders("base", [adapter], Path("out"), [], print)
    assert not children


def test_what_cannot_be_compared_is_told(children: list[MergeJob]) -> None:
    base_at("base")
    said: list[str] = []
    of_the_hub = adapter_at("hub", base="h" * 64, commit="c0ffee")
    merge_folders("base", [adapter_at("any"), of_the_hub], Path("out"), [], said.append)
    assert [words.partition(" ")[0] for words in said] == ["any", "hub"] and "c0ffee" in said[1]


def test_an_adapter_of_qlora_remembers_how_its_base_was_kept(children: list[MergeJob]) -> None:
    digest = weights_digest(base_at("base"))
    kept = {"precision": "bf16", "storage": "auto"}
    merge_folders("base", [adapter_at("ours", base=digest, four_bits=kept)], Path("out"), [], print)
    merge_folders("base", [adapter_at("any")], Path("any-out"), [], print)
    assert [job.four_bits for job in children] == [FourBitBase(**kept), None]


def test_every_adapter_of_ours_is_asked(children: list[MergeJob]) -> None:
    base_at("base")
    with pytest.raises(InputError, match="ours: this adapter was trained on another base"):
        merge_folders("base", [adapter_at("any"), adapter_at("ours", base="0" * 64)], Path("out"), [], print)


WRONG: dict[str, tuple[str, str, str]] = {
    "no such base": ("nowhere/at/all", "one", r"--base: nowhere/at/all: no such folder"),
    "no such adapter": ("base", "nowhere", r"nowhere: "),
    "the base for the adapter": ("base", "base", r"base: "),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_was_typed_wrong_is_an_input_error(wrong: str, children: list[MergeJob]) -> None:
    base_at("base")
    adapter_at("one")
    base, adapter, words = WRONG[wrong]
    with pytest.raises(InputError, match=words):
        merge_folders(base, [Path(adapter)], Path("out"), [], print)
    assert not children
