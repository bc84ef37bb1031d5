"""What has changed under a half-done phase is refused by name, before anything is touched; what decides nothing is free."""

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from phased_cpt.config.schema import Phase, RunConfig, Section, Source
from phased_cpt.errors import ConfigError, LedgerRefuses, PhasedCptError
from phased_cpt.ledger import read_record
from phased_cpt.run_dir import RunDir
from tests.conftest import TOKENIZER
from tests.faults.conftest import Config, Reference, Runs, Told
from tests.faults.criterion import apart, digests, everything, require_equal
from tests.journeys.conftest import planned

Keys = tuple[str, ...]


def leaves(annotation: Any) -> Iterator[Any]:
    """The types that a value may have."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for each in inner:
        yield from leaves(each)


def fields(section: type[Section], keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every recipe field of the schema that is a number, and what it is if nobody says otherwise."""
    for name, field in section.model_fields.items():
        found = set(leaves(field.annotation)) if not isinstance(field.annotation, type) else {field.annotation}
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, (*keys, name))
        elif found & {int, float} and bool not in found and field.json_schema_extra == {"change": "recipe"}:
            yield (*keys, name), field.default


NUMBERS: dict[Keys, Any] = {
    **dict(fields(RunConfig)),
    **{("phases", "1", *keys): default for keys, default in fields(Phase)},
    **{("phases", "1", "sources", "0", *keys): default for keys, default in fields(Source)},
}
# Numbers that decide nothing in this run, because another one rules.
IDLE = {
    ("training", "warmup_ratio"), ("training", "decay_ratio"), ("data", "max_line_bytes"), ("phases", "1", "tokens"),
    ("phases", "1", "epochs"), ("training", "constant_ratio"), ("training", "cooldown_ratio"),
    ("evaluation", "cooldown_ratio"), ("data", "temperature"), ("evaluation", "best_of"),
}  # fmt: skip


def changed(config: Config, keys: Keys, default: Any) -> Config | None:
    """The same configuration with another number there; None where every other one is refused as such."""
    now = config
    for key in keys:
        now = now[int(key)] if isinstance(now, list) else now.get(key, default) if isinstance(now, dict) else default
    was = now if isinstance(now, int | float) else default
    for value in (*((was + 1, was * 2, was / 2, was + 0.01, was - 1) if was is not None else ()), 1, 2, 0.5):
        other = copy.deepcopy(config)
        place: Any = other
        for key in keys[:-1]:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[keys[-1]] = value
        try:
            planned(other)
        except ConfigError:
            continue
        if value != was:
            return other
    return None


@pytest.mark.requirement("S-08")
@pytest.mark.fault("F19", "every number of the recipe, found in the schema, under a half-done phase", "refused by name (exit 4), nothing touched; unchanged it goes on: exact (E)")  # fmt: skip
def test_every_number_of_the_recipe_is_refused_by_name_when_it_changes(
    runs: Runs, reference: Reference, told: Told
) -> None:
    run = reference.copy("two steps of two")
    before, refused = digests(run), 0
    runs.config["phases"][1]["sources"] = [{"path": runs.config["phases"][1]["sources"]}]
    for keys, default in NUMBERS.items():
        if keys in IDLE or (keys[0] == "phases" and keys[-1] in ("replay",)):
            continue
        other = changed(runs.config, keys, default)
        assert other is not None, keys
        with pytest.raises(PhasedCptError) as refusal:
            runs.run(config=other)
        assert refusal.value.exit_code in (2, 4), (keys, refusal.value)
        name = "budget" if keys[-1] == "max_steps" else keys[-1]
        assert name in str(refusal.value), (keys, str(refusal.value))
        assert digests(run) == before, keys
        refused += 1
    assert refused > 15
    runs.run()
    require_equal(everything(run), reference.whole, "unchanged")
    told(f"{refused} numbers of the recipe", refused)


PHASES: dict[str, Any] = {
    "renamed": lambda one, two: [one, two | {"name": "deux"}],
    "the first renamed": lambda one, two: [one | {"name": "un"}, two],
    "reordered": lambda one, two: [two, one],
    "one inserted before": lambda one, two: [one | {"name": "zero"}, one, two],
    "one inserted between": lambda one, two: [one, two | {"name": "between"}, two],
    "the first deleted": lambda one, two: [two],
    "the half-done one deleted": lambda one, two: [one],
}


@pytest.mark.fault("F19", "phases renamed, reordered, inserted, deleted", "refused (exit 4), nothing touched; unchanged: exact (E)")  # fmt: skip
def test_phases_that_have_moved_under_a_half_done_run_are_refused(runs: Runs, reference: Reference, told: Told) -> None:
    run = reference.copy("two steps of two")
    before = digests(run)
    for what, moved in PHASES.items():
        with pytest.raises(LedgerRefuses, match=r"was phase (one|two), which is (\w+ now|gone)"):
            runs.run(config=runs.config | {"phases": moved(*runs.config["phases"])})
        assert digests(run) == before, what
    added = runs.config["phases"][0] | {"name": "three"}
    runs.run(config=runs.config | {"phases": [*runs.config["phases"], added]}, last="two")
    runs.run()
    beside = {"final", "sources"}  # that the phase to come was measured, too, when the second was done
    assert set(apart(everything(run), reference.whole)) == beside, "one more at the end, and then not"
    told(f"{len(PHASES)} ways to move phases", len(PHASES))


def byte_changed(path: Path, at: int) -> None:
    """One byte, and the time of the file is as it was."""
    content, times = bytearray(path.read_bytes()), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)


@pytest.mark.fault("F19", "a byte of the data, of the base, of the tokenizer; its time as it was", "refused by name (exit 4); restored: exact (E)")  # fmt: skip
def test_a_byte_that_changes_in_what_a_phase_is_made_of_is_refused(
    runs: Runs, reference: Reference, told: Told
) -> None:
    base, tokenizer, data = Path("base"), Path("tokenizer"), Path("data.jsonl")
    shutil.copytree(reference.folder / "all is done/random_base", base)
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER.with_name(name), tokenizer)
    shutil.copy(runs.config["phases"][0]["sources"], data)
    runs.config["phases"] = [runs.config["phases"][0] | {"sources": "data.jsonl"}]
    runs.config["model"] = {"name": "base", "tokenizer": "tokenizer", "precision": "fp32"}
    runs.run()
    wanted = everything(Path("run"))
    shutil.rmtree("run")
    with pytest.raises(PhasedCptError, match="the same command goes on"):
        runs.run(steps_today=2)
    word = tokenizer / "tokenizer.json"
    places = {
        base / "model.safetensors": (base / "model.safetensors").stat().st_size // 2,
        base / "config.json": (base / "config.json").read_bytes().index(b"rms_norm_eps") + len(b'rms_norm_eps": '),
        data: data.read_bytes().rindex(b"e"),
        word: word.read_bytes().index("Ġthe".encode()) + 3,
    }
    for path, at in places.items():
        byte_changed(path, at)
        with pytest.raises(PhasedCptError) as refusal:
            runs.run()
        name = {data: "sources.0", word: "tokenizer"}.get(path, "base")
        assert refusal.value.exit_code in (4, 2) and name in str(refusal.value), (path, refusal.value)
        byte_changed(path, at)
    runs.run()
    require_equal(everything(Path("run")), wanted, "restored")
    told(f"a byte of {', '.join(map(str, places))}", len(places))


EXECUTION: dict[str, Any] = {
    "training.micro_batch_size": {"training": {"micro_batch_size": 4}},
    "training.gradient_checkpointing": {"training": {"gradient_checkpointing": False}},
    "training.loss": {"training": {"loss": "plain"}},
    "model.attention": {"model": {"attention": "eager"}},
    "training.deepspeed": {"training": {"deepspeed": "zero3"}},
    "evaluation.micro_batch_size": {"evaluation": {"micro_batch_size": 1}},
}


@pytest.mark.fault("F19", "how it is executed has changed: micro batch, kernels, loss, ZeRO stage", "goes on, not exact, and run.json says so")  # fmt: skip
@pytest.mark.parametrize("key", [pytest.param(key, marks=[] if key == "training.loss" else pytest.mark.heavy) for key in EXECUTION])  # fmt: skip
def test_another_way_of_execution_goes_on_and_is_recorded(key: str, runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two")
    runs.run(config=runs.with_(**EXECUTION[key]))
    record = read_record(RunDir(Path("run")))
    assert record is not None and record.is_finished
    assert f"two.{key}" in record.attempts[-1].inexact


@pytest.mark.fault(
    "F19", "bookkeeping has changed: when it saves, what it keeps, what it is called", "goes on: exact (E)"
)
def test_bookkeeping_may_change(runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two")
    others = runs.with_(
        checkpoint={"every_steps": 2, "keep": 5}, launch={"hang_minutes": 3, "retries": 2}, merge={"enabled": False, "max_shard_size": "1GB"},
        run={"name": "another"}, tracking={"tensorboard": {"enabled": False}},
    )  # fmt: skip
    others["phases"] = [phase | {"description": "in other words"} for phase in others["phases"]]
    runs.run(config=others)
    require_equal(everything(Path("run")), reference.whole, "other bookkeeping")
