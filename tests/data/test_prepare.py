"""`phased-cpt prepare` as a user meets it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phased_cpt.data import emit
from phased_cpt.data.blocks import IGNORED
from phased_cpt.errors import InputError
from tests.conftest import REPOSITORY, SAMPLE, TOKENIZER, Call, Write
from tests.data.conftest import Prepare, lines, texts

OWED = [
    "documents",
    "chunks",
    "blocks",
    "tokens_source",
    "tokens_trained",
    "tokens_first",
    "tokens_context",
    "tokens_padded",
    "tokens_dropped",
    "efficiency",
    "duplicates",
    "tokenizer_backend",
    "seconds",
    "mb_per_second",
    "cached",
]
TEXTS = [{"text": f"This is document number {number}. " * (1 + number % 30)} for number in range(200)]


def splits(call: Call, *arguments: str) -> dict[str, dict[str, Any]]:
    answer = call("prepare", *arguments, "--json")
    assert answer.code == 0, answer.err
    return {
        f"{phase['name']}.{side}": split
        for phase in json.loads(answer.out)["phases"]
        for side, split in phase["splits"].items()
    }


def test_one_phase_alone_is_prepared_as_among_the_others(call: Call, config: Callable[..., Path], write: Write) -> None:
    """As the tasks of an array do it, by index; in what they share they wait for each other."""
    for name, records in (("a.jsonl", TEXTS), ("b.jsonl", TEXTS[1:])):
        write("".join(json.dumps(record) + "\n" for record in records), name)
    path = str(config("a.jsonl", "b.jsonl"))
    assert list(splits(call, "-c", path, "--phase", "1")) == ["phase_1.train", "phase_1.eval"]
    both = splits(call, "-c", path)
    assert (both["phase_0.train"]["cached"], both["phase_1.train"]["cached"]) == (False, True)
    alone = splits(call, "-c", path, "--phase", "phase_1")
    assert alone["phase_1.train"]["tokens_trained"] == both["phase_1.train"]["tokens_trained"]
    refused = call("prepare", "-c", path, "--phase", "2")
    assert (refused.code, refused.err) == (2, "--phase: no phase is called '2'"
        " (phases: phase_0, phase_1), or 0 to 1\n")  # fmt: skip


@pytest.mark.requirement("K-08", "K-11", "X-03")
def test_the_demo_is_prepared_and_every_figure_is_there(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    arguments = ("-c", "configs/demo.yaml", "--set", f"run.output_dir={tmp_path}")
    found = splits(call, *arguments)
    assert list(found) == [f"{name}.{side}" for name in ("groundwork", "foundation", "evolution", "pr_mastery") for side in ("train", "eval")]  # fmt: skip
    for split in found.values():
        assert set(OWED) <= split.keys()
        assert split["tokens_source"] == split["tokens_trained"] + split["tokens_first"] + split["tokens_dropped"]
        positions = split["tokens_source"] - split["tokens_dropped"] + split["tokens_context"] + split["tokens_padded"]
        assert positions == split["blocks"] * 512
        assert split["tokenizer_backend"] == "fastokens"
    assert found["foundation.train"]["tokens_trained"] > 50_000
    again = splits(call, *arguments)
    assert [split["cached"] for split in found.values()] == [False] * 8
    assert [split["cached"] for split in again.values()] == [True] * 8
    same = [*OWED[:11]]
    assert [[split[key] for key in same] for split in again.values()] == [[split[key] for key in same] for split in found.values()]  # fmt: skip


def test_the_table_says_what_became_of_every_token(call: Call, write: Write, config: Callable[..., Path]) -> None:
    write(lines(*TEXTS, {"text": ""}, {"text": "<|endoftext|>"}, *TEXTS[:2]), "a.jsonl")
    answer = call("prepare", "-c", str(config("a.jsonl")))
    assert answer.code == 0
    for word in (
        "documents",
        "blocks",
        "trained",
        "context",
        "padded",
        "dropped",
        "copies",
        "s by fastokens",
        "first: nothing predicts it",
    ):
        assert word in answer.out
    assert "documents end with <|endoftext|>" in answer.out
    assert "1 empty texts; 1 with the text of a special token, kept as text" in answer.out
    assert "? steps: they follow from the number of GPUs" in answer.out
    assert "from the cache" in call("prepare", "-c", "run.json").out


@pytest.mark.parametrize(
    ("records", "data", "warning"),
    [
        (TEXTS * 2, {}, r"phase_0: 1\d\d of 3\d\d training documents are copies of others"),
        (TEXTS[:1], {}, "phase_0: nothing is held out, so nothing can be measured; give it eval_sources, or more docu"),
        (TEXTS, {"chunk_long_samples": False}, r"phase_0: \d+ documents were shortened to 64 tokens; data.chunk_long_sam"),
        (TEXTS, {"overlap_tokens": 0}, r"phase_0: \d.\d% of the tokens are first in a window and not trained; data.overlap"),
        (TEXTS[:3], {}, r"phase_0: \d\d% of the tokens are held out \(data.eval_share is 0.05 of the documents\)"),
    ],
)  # fmt: skip
def test_what_is_odd_is_told(
    call: Call, write: Write, config: Callable[..., Path], records: list[Any], data: dict[str, Any], warning: str
) -> None:
    write(lines(*records), "a.jsonl")
    out = call("prepare", "-c", str(config("a.jsonl", **data))).out
    assert re.search(f"careful: {warning}", out), out
    write(lines(*TEXTS), "a.jsonl")
    assert "careful" not in call("prepare", "-c", str(config("a.jsonl"))).out, "the control"


def test_copies_are_reported_within_across_and_against_what_is_held_out(prepared: Prepare, write: Write) -> None:
    write(lines(*TEXTS, *TEXTS[:10]), "a.jsonl")
    write(lines(*TEXTS[150:], {"text": "only here"}), "b.jsonl")
    run = prepared("a.jsonl", "b.jsonl")
    one, other = run.phases
    assert sum(run.duplicates("phase_0", side) for side in one.splits) == 10
    assert sum(run.duplicates("phase_1", side) for side in other.splits) == 0
    (copy,) = run.copies()
    held = set(map(int, one.eval.digests)) if one.eval else set()
    trained = [int(each) for each in one.train.digests]
    here = set(map(int, other.train.digests))
    assert copy.documents == sum(each in here for each in trained) > 40
    assert held.isdisjoint(here)
    assert "of phase_0 (train) are in phase_1 (train), too" in str(copy)
    assert not [copy for copy in run.copies() if copy.leaks], "the split puts copies on one side, in every source"


def test_an_eval_file_of_ones_own_leaves_all_sources_to_train_on_and_leaks_are_told(
    call: Call, write: Write, config: Callable[..., Path]
) -> None:
    write(lines(*TEXTS), "a.jsonl")
    write(lines(*TEXTS[:5], {"text": "not in a"}), "eval.jsonl")
    config("a.jsonl")
    own = ("-c", "run.json", "--set", "phases.0.eval_sources=eval.jsonl")
    found = splits(call, *own)
    assert found["phase_0.train"]["documents"] == 200
    assert found["phase_0.eval"]["documents"] == 6
    told = "careful: 5 of the 6 documents of phase_0 (eval) are in phase_0 (train), too (83.3%)"
    assert told in call("prepare", *own).out
    assert splits(call, "-c", "run.json")["phase_0.train"]["documents"] < 200, "the control"


@pytest.mark.requirement("D-04")
def test_the_split_comes_before_weights_and_is_the_same_for_other_runs(
    call: Call, write: Write, config: Callable[..., Path]
) -> None:
    write(lines(*TEXTS), "a.jsonl")
    config("a.jsonl")
    plain = splits(call, "-c", "run.json")
    weighted = splits(
        call, "-c", "run.json", "--set", "phases.0.sources=[{path: a.jsonl, weight: 2.5}]", "--set", "run.seed=7"
    )
    documents = plain["phase_0.train"]["documents"]
    assert weighted["phase_0.train"]["documents"] == 2 * documents + (documents + 1) // 2
    assert weighted["phase_0.eval"] == plain["phase_0.eval"] | {key: weighted["phase_0.eval"][key] for key in ("seconds", "mb_per_second", "cached")}  # fmt: skip


@pytest.mark.requirement("K-07")
def test_no_row_is_an_error_that_names_the_way_out(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "tiny"}, {"text": "also tiny"}, {"text": "and this"}), "a.jsonl")
    with pytest.raises(
        InputError, match=r"phase_0: \d+ tokens do not fill one row of 64; packing: pad fills the row up"
    ):
        prepared("a.jsonl", packing="concat")
    for packer in ("pad", "best_fit", "none"):
        assert prepared("a.jsonl", packing=packer).phases[0].train.index.account.blocks >= 1


@pytest.mark.requirement("K-07")
def test_a_tiny_data_set_trains_at_1024_with_pad(prepared: Prepare, write: Write) -> None:
    write(lines({"text": "tiny"}), "a.jsonl")
    run = prepared("a.jsonl", packing="pad", max_tokens=1024, set_=("model.from_config.max_position_embeddings=1024",))
    row = run.phases[0].train.index.blocks[0]
    assert row["labels"][row["labels"] != IGNORED].tolist()[-1] == run.tokenizer.eos_id
    assert run.phases[0].eval is None, "one document cannot be spared"


@pytest.mark.requirement("K-01")
def test_every_document_has_one_end_and_it_is_trained_wherever_windows_end(prepared: Prepare, write: Write) -> None:
    """The trap: an EOS that is put behind each window, or is cut off a window that is full."""
    write(lines(*({"text": "x " * count} for count in range(20, 200))), "a.jsonl")
    run = prepared("a.jsonl", eval_share=0)
    blocks = run.phases[0].train.index.blocks
    ends = sum(int((blocks[at]["labels"] == run.tokenizer.eos_id).sum()) for at in range(len(blocks)))
    assert ends == 180
    assert run.phases[0].train.index.account.chunks > 300, "the control: many windows are no end"


@pytest.mark.requirement("K-08")
def test_emitted_rows_are_the_rows(call: Call, prepared: Prepare, write: Write, config: Callable[..., Path]) -> None:
    write(lines(*TEXTS), "a.jsonl")
    run = prepared("a.jsonl")
    assert call("prepare", "-c", "run.json", "--emit-jsonl", "rows").code == 0
    assert sorted(path.name for path in Path("rows").iterdir()) == [
        "phase1_phase_0.eval.jsonl",
        "phase1_phase_0.train.jsonl",
    ]
    for side, split in run.phases[0].splits.items():
        emitted = [json.loads(line) for line in Path(f"rows/phase1_phase_0.{side}.jsonl").read_text().splitlines()]
        blocks = split.index.blocks
        assert len(emitted) == len(blocks)
        for at, row in enumerate(emitted):
            assert list(row) == ["input_ids", "position_ids", "labels"]
            assert row == {key: values.tolist() for key, values in blocks[at].items()}  # type: ignore[attr-defined]


def test_where_files_are_to_be_written_is_asked_for_first(
    call: Call, write: Write, config: Callable[..., Path]
) -> None:
    write(lines(*TEXTS), "a.jsonl")
    config("a.jsonl")
    for option in ("--emit-jsonl", "--emit-bin"):
        answer = call("prepare", "-c", "run.json", option, "a.jsonl")
        assert (answer.code, answer.err) == (2, f"{option} a.jsonl: this is a file; name a folder\n")
        answer = call("prepare", "-c", "run.json", option, "/proc/none")
        assert (answer.code, answer.err[:40]) == (2, f"{option} /proc/none: cannot be made (No such file"[:40])
    assert not Path("outputs").exists(), "nothing was made yet"


@pytest.mark.requirement("K-08")
def test_tokens_as_plain_files_are_a_source_with_the_same_rows(
    call: Call, prepared: Prepare, write: Write, config: Callable[..., Path]
) -> None:
    write(lines(*TEXTS), "a.jsonl")
    before = prepared("a.jsonl").phases[0]
    assert call("prepare", "-c", "run.json", "--emit-bin", "bin").code == 0
    assert prepared("bin").phases[0].train.stores[0].facts["documents"] == 200, "the folder is a source, too"
    meta = json.loads(Path("bin/phase1_phase_0.train.bin.meta.json").read_text())
    assert (meta["dtype"], meta["documents"], meta["eos_id"]) == ("uint16", before.train.index.account.documents, 0)
    own = ("phases.0.eval_sources=bin/phase1_phase_0.eval.bin",)
    after = prepared("bin/phase1_phase_0.train.bin", set_=own).phases[0]
    for side in ("train", "eval"):
        one, other = (phase.splits[side].index.blocks for phase in (before, after))
        assert len(one) == len(other)
        assert all((one[at][key] == other[at][key]).all() for at in range(len(one)) for key in ("input_ids", "labels"))  # type: ignore[literal-required]


@pytest.mark.parametrize(
    ("meta", "ids", "problem"),
    [
        ({"dtype": "uint16", "tokens": 5}, [5, 6, 0], r"6 bytes, and a.bin.meta.json says 5 ids of uint16; the file may"),
        ({"dtype": "uint16", "seq_len": 4, "n_sequences": 1}, [5, 6, 0], r"says 4 ids of uint16; the file may be incomp"),
        ({"dtype": "float32"}, [5, 6, 0], r"a.bin.meta.json: dtype: given 'float32'; allowed: uint16, uint32"),
        ([], [5, 6, 0], r"a.bin.meta.json: dtype: given '\[\]'; allowed"),
        ({"dtype": "uint16"}, [5, 9999, 0], r"a.bin: id 9999, and .* has 4096"),
        ({"dtype": "uint16"}, [5, 6, 7], r"a.bin: no document ends in it \(id 0, <\|endoftext\|>\); is it this one's\?"),
        ({"dtype": "uint16", "eos_id": 7}, [5, 7, 0], r"a.bin: its documents end with id 7, and not with id 0 of "),
        ({"dtype": "uint16", "tokens": None}, [5, 7, 0], r"a.bin.meta.json: tokens: given 'None'; allowed: a whole number"),
        ({"dtype": "uint16"}, [5, 4096, 0], r"a.bin: id 4096, and .* has 4096"),
        ({"dtype": "uint16", "tokenizer": "f" * 64}, [5, 0], r"a.bin: made with another tokenizer than "),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be_right_are_refused(
    prepared: Prepare, write: Write, meta: object, ids: list[int], problem: str
) -> None:
    write(np.array(ids, np.uint16).tobytes(), "a.bin")
    write(json.dumps(meta), "a.bin.meta.json")
    with pytest.raises(InputError, match=problem):
        prepared("a.bin")


def test_ids_are_read_as_wide_as_their_meta_says(prepared: Prepare, write: Write) -> None:
    """uint32 read as uint16 is garbage without an error; a row of another trainer may end without an EOS."""
    write(np.array([5, 6, 0, 70, 80, 0, 9], np.uint32).tobytes(), "a.bin")
    write('{"dtype": "uint32", "seq_len": 7, "n_sequences": 1}', "a.bin.meta.json")
    store = prepared("a.bin").phases[0].train.stores[0]
    assert (store.ids.tolist(), store.offsets.tolist()) == ([5, 6, 0, 70, 80, 0, 9], [0, 3, 6, 7])


def test_a_block_is_shown_as_text_with_its_borders_and_what_is_not_trained(
    call: Call, write: Write, config: Callable[..., Path]
) -> None:
    write(lines({"text": "short one"}, {"text": "word " * 100}), "a.jsonl")
    config("a.jsonl", eval_share=0)
    shown = [call("prepare", "-c", "run.json", "--inspect", f"phase_0:{at}").out for at in range(2)]
    assert re.match(r"phase_0, train, block 1 of 2: 64 positions, \d+ trained; ⟦not trained⟧", shown[1])
    facts = json.loads(call("prepare", "-c", "run.json", "--inspect", "phase_0:1", "--json").out)
    assert sum(piece["end"] - piece["begin"] for piece in facts["slices"]) == sum(
        each >= 0
        for each in facts["row"]["input_ids"][: sum(piece["end"] - piece["begin"] for piece in facts["slices"])]
    )
    assert {piece["source"] for piece in facts["slices"]} == {"a.jsonl"}
    everything = "".join(shown)
    assert "── document 0 of a.jsonl ──\n⟦" in everything
    assert re.search(r"── document 1 of a.jsonl, tokens 56 to \d+ of \d+ ──\n⟦( ?word){8}⟧ word", everything)
    assert "positions of padding" in everything
    for which, problem in {
        "phase_0": "give PHASE:N", "phase_0:x": "give PHASE:N", "phase_0:9": "there are 2 blocks, 0 to 1",
        "other:0": "no phase is called 'other' (phases: phase_0)", "phase0:0": "did you mean phase_0?", "phase_0:eval:0": "nothing of phase_0 is held out",
    }.items():  # fmt: skip
        answer = call("prepare", "-c", "run.json", "--inspect", which)
        assert (answer.code, answer.out) == (2, "")
        assert problem in answer.err


@pytest.mark.requirement("D-03")
def test_a_data_set_is_loaded_by_its_split(prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `datasets`, from a folder that is laid out as a repository of the hub is."""
    write(lines(*({"text": f"train {at}", "day": "2024-01-01"} for at in range(5))), "set/train.jsonl")
    write(lines({"text": "a test", "day": "2024-01-01"}), "set/test.jsonl")
    monkeypatch.setenv("HF_HOME", str(Path("hf").resolve()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = "phases.0.sources={path: ./set, split: SPLIT}"
    train, test = (
        prepared("set", set_=(source.replace("SPLIT", split),), eval_share=0).phases[0].train
        for split in ("train", "test")
    )
    assert (train.index.account.documents, test.index.account.documents) == (5, 1)
    assert prepared("set", set_=(source.replace("SPLIT", "train"),), eval_share=0).phases[0].train.cached
    with pytest.raises(InputError, match=r"\./set: `datasets` cannot load it: .*Unknown split \"nope\""):
        prepared("set", set_=(source.replace("SPLIT", "nope"),))
    with pytest.raises(InputError, match=r"some/data: .*`datasets` cannot load it: "):
        prepared("some/data")


def test_preparing_loads_no_torch(write: Write, config: Callable[..., Path]) -> None:
    write(lines({"messages": [{"role": "user", "content": "x"}]}), "a.jsonl")
    heavy = "{'torch', 'transformers', 'deepspeed', 'peft', 'datasets', 'pyarrow'}"
    code = "import sys; from phased_cpt.cli import main\ntry: main()\nfinally: sys.exit(bool(HEAVY & {*sys.modules}))"
    code = code.replace("HEAVY", heavy)
    command = [sys.executable, "-c", code, "prepare", "-c", str(config("a.jsonl"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command[2] = command[2].replace("import sys;", "import sys, pyarrow;")
    assert subprocess.run(command, capture_output=True).returncode == 1, "the control"


def test_a_file_that_is_emitted_is_whole_or_not_there(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(lines(*TEXTS), "a.jsonl")
    run = prepared("a.jsonl")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "phase1_phase_0.train.bin.meta.json").write_text('{"dtype": "uint32"}')

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write_them in (emit.rows, emit.documents):
        with pytest.raises(OSError, match="No space"):
            write_them(run, folder)
    assert list(folder.iterdir()) == [], "no part, and no meta of an older one"


def test_how_far_it_has_come_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line now and then in a log; a bar, with its speed, on a terminal; nothing for what was there already."""
    from phased_cpt import progress

    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    bar = progress.Bar()
    bar.begin("there.jsonl", 10**9)
    bar.end()
    bar.begin("a.jsonl", 30_000_000)
    for _ in range(3):
        bar.advance(10_000_000)
    bar.end()
    told = capsys.readouterr().err.splitlines()
    assert told == ["a.jsonl: 20 of 30 MB, 1 MB/s, 9 s left"], "every ten seconds"


def test_the_recipe_for_a_repository_makes_sources(
    prepared: Prepare, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python of dataset/README.md, in a repository of two commits."""
    write("x = 1\n", "code/a.py")
    monkeypatch.chdir("code")
    for command in ("init -q", "add a.py", "-c user.name=n -c user.email=e@x commit -qm first"):
        subprocess.run(["git", *command.split()], check=True)
    Path("a.py").write_text("x = 2\n")
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qam", "second"], check=True)
    (recipe,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "dataset/README.md").read_text(), re.DOTALL)
    exec(compile(recipe, "dataset/README.md", "exec"), {})
    monkeypatch.chdir("..")
    run = prepared("code/files.jsonl", "code/commits.jsonl")
    files, commits = (texts(phase, run.tokenizer) for phase in run.phases)
    assert files == ["# a.py\nx = 2\n"]
    assert commits[0].startswith("first\n")
    assert "-x = 1\n+x = 2" in commits[1]


def test_the_sample_is_small_and_names_its_end() -> None:
    assert {path.name for path in SAMPLE.iterdir()} == {
        "phase1_foundation.jsonl", "phase2_evolution.jsonl", "phase3_pr_mastery.jsonl", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert 300_000 < sum(path.stat().st_size for path in SAMPLE.glob("*.jsonl")) < 700_000
    assert json.loads(TOKENIZER.read_text())["added_tokens"][0]["content"] == "<|endoftext|>"
