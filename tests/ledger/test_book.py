"""What is done, and what may follow it."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from phased_cpt.config import Loaded
from phased_cpt.errors import InputError, LedgerRefuses, PhasedCptError
from phased_cpt.ledger import Ledger, book, choose_run_dir, newest_run, read_record
from phased_cpt.ledger.fingerprint import Adapter, Inputs, Weights
from phased_cpt.plan import PhasePlan, Plan, make_plan
from phased_cpt.run_dir import RunDir, publish_file
from tests.conftest import Call, Write

RUN = """\
    run: {name: tales}
    model: {name: some/model}
    launch: {num_gpus: 2}
    phases:
      - {name: foundation, sources: a.jsonl}
      - {name: evolution, sources: b.jsonl}
      - {name: pr_mastery, sources: c.jsonl}
"""
BASE = Weights(kind="base", base="b" * 64)

MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(loaded: Callable[..., Loaded]) -> MakePlan:
    return lambda *overrides, text=RUN: make_plan(loaded(text, *overrides))


@pytest.fixture
def here(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "here")


def inputs(start: Weights = BASE, data: str = "d") -> Inputs:
    return Inputs(start=start, tokenizer="t" * 64, sources={"sources.0": data * 64})


def adapter(phase: PhasePlan, ledger: Ledger) -> Weights:
    """What a phase publishes: here, a folder with a file in it."""
    folder = ledger.run_dir.root / phase.folder
    folder.mkdir(exist_ok=True)
    (folder / "best_adapter").write_text(phase.name)
    return Weights(kind="adapter", base=BASE.base, adapters=(Adapter(digest=phase.name, folder=phase.folder),))


def begin_all(ledger: Ledger, plan: Plan, until: str | None = None) -> None:
    """Train every phase (or up to one, which is left half done), as a conductor would."""
    start = BASE
    for phase in plan.phases:
        if not ledger.is_done(phase, inputs(start)):
            ledger.begin(phase, inputs(start))
            if phase.name == until:
                return
            ledger.publish(phase, adapter(phase, ledger))
            ledger.require_done(phase)
        start = ledger.published_by(phase)


def adapter_in(folder: str) -> Weights:
    return Weights(kind="adapter", base=BASE.base, adapters=(Adapter(digest="a", folder=folder),))


def states(run_dir: RunDir) -> list[str]:
    record = read_record(run_dir)
    assert record is not None
    return [phase.state for phase in record.phases]


class TestARun:
    def test_it_is_recorded_phase_by_phase(self, plan: MakePlan, here: RunDir) -> None:
        ledger = Ledger.open(here, plan())
        assert states(here) == ["pending", "pending", "pending"]
        begin_all(ledger, plan(), until="evolution")
        assert states(here) == ["done", "running", "pending"]
        begin_all(Ledger.open(here, plan()), plan())
        assert states(here) == ["done", "done", "done"]
        assert Ledger.open(here, plan()).is_finished

    def test_each_phase_records_what_it_started_from_and_what_it_published(self, plan: MakePlan, here: RunDir) -> None:
        ledger = Ledger.open(here, plan())
        begin_all(ledger, plan())
        foundation, evolution, _ = ledger.record.phases
        assert foundation.started_from == BASE
        assert evolution.started_from == foundation.published
        assert evolution.published is not None
        assert (evolution.published.kind, evolution.published.adapters[0].digest) == ("adapter", "evolution")
        assert evolution.started
        assert evolution.finished

    def test_a_phase_may_publish_a_base(self, plan: MakePlan, here: RunDir) -> None:
        ledger = Ledger.open(here, plan())
        phase = plan().phases[0]
        ledger.begin(phase, inputs())
        (here.root / phase.folder / "base").mkdir(parents=True)
        ledger.publish(phase, Weights(kind="base", base="c" * 64, folder=f"{phase.folder}/base"))
        assert Ledger.open(here, plan()).published_by(phase).base == "c" * 64

    def test_ending_without_publishing_is_not_done(self, plan: MakePlan, here: RunDir) -> None:
        ledger = Ledger.open(here, plan())
        ledger.begin(plan().phases[0], inputs())
        with pytest.raises(PhasedCptError, match="phase foundation has ended without publishing anything"):
            ledger.require_done(plan().phases[0])

    def test_a_phase_cannot_begin_before_the_one_it_starts_from(self, plan: MakePlan, here: RunDir) -> None:
        ledger = Ledger.open(here, plan())
        with pytest.raises(PhasedCptError, match="phase evolution must start from what foundation published"):
            ledger.begin(plan().phases[1], inputs())
        begin_all(ledger, plan(), until="evolution")
        other = Weights(kind="adapter", base=BASE.base, adapters=(Adapter(digest="another"),))
        with pytest.raises(PhasedCptError, match="must start from what evolution published"):
            ledger.begin(plan().phases[2], inputs(other))

    def test_a_phase_begins_from_the_very_weights_that_the_one_before_published(
        self, plan: MakePlan, here: RunDir
    ) -> None:
        ledger, (foundation, evolution, _) = Ledger.open(here, plan()), plan().phases
        ledger.begin(foundation, inputs())
        ledger.publish(foundation, adapter(foundation, ledger))
        other = Weights(kind="adapter", base=BASE.base, adapters=(Adapter(digest="another"),))
        for start in (other, BASE):
            with pytest.raises(PhasedCptError, match="phase evolution must start from what foundation published"):
                ledger.begin(evolution, inputs(start))
        ledger.begin(evolution, inputs(ledger.published_by(foundation)))
        assert states(here) == ["done", "running", "pending"]

    def test_what_is_published_must_be_there(self, plan: MakePlan, here: RunDir) -> None:
        ledger = Ledger.open(here, plan())
        phase = plan().phases[0]
        ledger.begin(phase, inputs())
        nowhere = Weights(kind="adapter", base=BASE.base, adapters=(Adapter(digest="a", folder="nowhere"),))
        with pytest.raises(PhasedCptError, match="phase foundation published nowhere, which is not there"):
            ledger.publish(phase, nowhere)
        ledger.publish(phase, adapter(phase, ledger))
        shutil.rmtree(here.root / phase.folder)
        for ask in (lambda: ledger.is_done(phase, inputs()), lambda: ledger.require_done(phase)):
            with pytest.raises(PhasedCptError, match="published phase1_foundation, which is not there; restore it, or"):
                ask()

    def test_what_is_published_lies_in_the_run(self, plan: MakePlan, here: RunDir) -> None:
        ledger, phase = Ledger.open(here, plan()), plan().phases[0]
        ledger.begin(phase, inputs())
        with pytest.raises(PhasedCptError, match="publishes a base, but does not say where it lies"):
            ledger.publish(phase, BASE)
        for folder in ("/tmp/x", "../x"):
            with pytest.raises(ValueError, match="does not lie in the run folder"):
                adapter_in(folder)

    def test_an_adapter_without_an_adapter_is_none(self) -> None:
        with pytest.raises(ValueError, match="there is none"):
            Weights(kind="adapter", base=BASE.base)

    def test_what_counts_as_done_is_what_is_on_disk(self, plan: MakePlan, here: RunDir) -> None:
        """The one who asks need not be the one who wrote."""
        ours, phase = Ledger.open(here, plan()), plan().phases[0]
        ours.begin(phase, inputs())
        theirs = Ledger(here, read_record(here))  # type: ignore[arg-type]
        with pytest.raises(PhasedCptError, match="has ended without publishing"):
            ours.require_done(phase)
        theirs.publish(phase, adapter(phase, theirs))
        ours.require_done(phase)

    def test_what_a_later_version_has_added_is_kept(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan(), until="evolution")
        content = json.loads(here.ledger.read_text())
        content["wandb_id"] = "abc"
        content["phases"][0]["gate"] = {"verdict": "passed"}
        here.ledger.write_text(json.dumps(content))
        begin_all(Ledger.open(here, plan()), plan())
        after = json.loads(here.ledger.read_text())
        assert (after["wandb_id"], after["phases"][0]["gate"]) == ("abc", {"verdict": "passed"})

    def test_a_phase_that_is_not_running_has_nothing_to_publish(self, plan: MakePlan, here: RunDir) -> None:
        ledger = Ledger.open(here, plan())
        with pytest.raises(PhasedCptError, match="phase foundation is not running"):
            ledger.publish(plan().phases[0], BASE)

    def test_a_phase_cannot_begin_while_its_batch_is_not_known(
        self, loaded: Callable[..., Loaded], here: RunDir
    ) -> None:
        unknown = make_plan(loaded(RUN.replace("launch: {num_gpus: 2}", "")))
        with pytest.raises(PhasedCptError, match="the number of GPUs is not known"):
            Ledger.open(here, unknown).begin(unknown.phases[0], inputs())

    def test_a_lost_record_is_not_written_anew_over_what_was_trained(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan())
        first = here.config_resolved.read_bytes()
        here.ledger.unlink()
        with pytest.raises(PhasedCptError, match=r"run\.json is gone, but phase1_foundation, .* has been trained here"):
            Ledger.open(here, plan("training.learning_rate=5e-5"))
        assert here.config_resolved.read_bytes() == first

    def test_run_json_is_readable_by_people_and_holds_its_format(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan())
        content = json.loads(here.ledger.read_text())
        assert content["format"] == 1
        assert content["phases"][0]["fingerprint"]["parts"]["training.learning_rate"] == 1e-4

    def test_nothing_in_the_folder_names_the_folder(self, plan: MakePlan, here: RunDir) -> None:
        on_itself = plan(f"run.dir={here.root}")
        begin_all(Ledger.open(here, on_itself), on_itself, until="evolution")
        begin_all(Ledger.open(here, plan()), plan())
        assert str(here.root) not in here.ledger.read_text() + here.config_resolved.read_text()
        assert read_record(here).attempts[1].differences == {}  # type: ignore[union-attr]


class TestGoingOn:
    def test_a_new_phase_at_the_end_of_a_finished_run_is_welcome(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan())
        longer = plan(text=RUN + "      - {name: style, sources: d.jsonl}\n")
        ledger = Ledger.open(here, longer)
        assert states(here) == ["done", "done", "done", "pending"]
        begin_all(ledger, longer)
        assert ledger.is_finished

    def test_a_phase_that_has_not_begun_may_change_move_or_go(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan(), until="foundation")
        other = plan("phases.evolution.epochs=7", "phases.evolution.name=other")
        assert [phase.name for phase in Ledger.open(here, other).record.phases] == ["foundation", "other", "pr_mastery"]
        assert states(here) == ["running", "pending", "pending"]

    @pytest.mark.parametrize("until", ["evolution", None], ids=["half done", "done"])
    def test_a_changed_recipe_is_refused_field_by_field_with_the_ways_out(
        self, plan: MakePlan, here: RunDir, until: str | None
    ) -> None:
        begin_all(Ledger.open(here, plan()), plan(), until)
        before = here.ledger.read_bytes()
        with pytest.raises(LedgerRefuses) as refused:
            Ledger.open(here, plan("phases.evolution.training={learning_rate: 5e-5, weight_decay: 0}"))
        assert str(refused.value) == (
            f"phase evolution {'has begun' if until else 'is done'}, with other values than it has now:\n"
            "    training.learning_rate: was 0.0001, is 5e-05\n"
            "    training.weight_decay: was 0.1, is 0.0\n"
            "put them back, start another run with `--new`, or train it again with `--redo-from evolution` "
            "(what it made is archived)"
        )
        assert here.ledger.read_bytes() == before, "nothing was written"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (RUN.replace("name: foundation", "name: groundwork"), "was phase foundation, which is groundwork now"),
            (RUN.replace("evolution", "x").replace("foundation", "evolution").replace("name: x", "name: foundation"),
             "was phase foundation, which is evolution now"),
            ("\n".join(line for line in RUN.splitlines() if "evolution" not in line and "pr_" not in line),
             "was phase evolution, which is gone"),
            (RUN.replace("phases:\n", "phases:\n      - {name: first, sources: z}\n"), "was phase foundation, which is first now"),
        ],
        ids=["renamed", "reordered", "removed", "inserted"],
    )  # fmt: skip
    def test_phases_that_have_begun_keep_their_names_and_places(
        self, plan: MakePlan, here: RunDir, text: str, message: str
    ) -> None:
        begin_all(Ledger.open(here, plan()), plan(), until="pr_mastery")
        with pytest.raises(LedgerRefuses, match=message):
            Ledger.open(here, plan(text=text))

    def test_other_data_under_a_phase_that_has_begun_is_refused(self, plan: MakePlan, here: RunDir) -> None:
        ledger = Ledger.open(here, plan())
        begin_all(ledger, plan(), until="foundation")
        with pytest.raises(LedgerRefuses) as refused:
            ledger.is_done(plan().phases[0], inputs(data="e"))
        assert "    sources.0: was dddddddddddd…, is eeeeeeeeeeee…\n    (sources.0 is a.jsonl)" in str(refused.value)
        assert not ledger.is_done(plan().phases[0], inputs())

    def test_execution_may_change_and_is_recorded_as_inexact(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan(), until="evolution")
        other = plan("training.deepspeed=zero3", "model.attention=sdpa")
        ledger = Ledger.open(here, other)
        begin_all(ledger, other, until="evolution")
        assert ledger.record.attempts[-1].inexact == {
            "evolution.training.deepspeed": ("auto", "zero3"),
            "evolution.model.attention": ("auto", "sdpa"),
        }
        assert ledger.record.attempts[0].inexact == {}

    def test_versions_and_kernels_are_execution_too(self, plan: MakePlan, here: RunDir) -> None:
        phase, old = plan().phases[0], inputs().model_copy(update={"execution": {"torch": "2.13.0"}})
        Ledger.open(here, plan()).begin(phase, old)
        ledger = Ledger.open(here, plan())
        ledger.begin(phase, old.model_copy(update={"execution": {"torch": "2.14.0"}}))
        assert ledger.record.attempts[-1].inexact == {"foundation.torch": ("2.13.0", "2.14.0")}

    def test_another_number_of_gpus_is_free_at_the_same_global_batch_and_refused_at_another(
        self, plan: MakePlan, here: RunDir
    ) -> None:
        begin_all(Ledger.open(here, plan()), plan(), until="foundation")
        same = ("launch.num_gpus=4", "training.gradient_accumulation_steps=3")
        ledger = Ledger.open(here, plan(*same))
        begin_all(ledger, plan(*same), until="foundation")
        assert ledger.record.attempts[-1].inexact == {
            "foundation.ranks": (2, 4),
            "foundation.training.gradient_accumulation_steps": (6, 3),
        }
        with pytest.raises(LedgerRefuses) as refused:
            Ledger.open(here, plan("launch.num_gpus=4"))
        assert "    training.global_batch_size: was 12, is 24\n" in str(refused.value)
        keep = "--set phases.foundation.training.global_batch_size=12"
        assert f"(the batch follows from the number of GPUs, 4 now; `{keep}` keeps it)" in str(refused.value)
        Ledger.open(here, plan("launch.num_gpus=4", keep.removeprefix("--set ")))
        with pytest.raises(LedgerRefuses) as refused:
            Ledger.open(here, plan("launch.num_gpus=5"))
        assert "keeps it" not in str(refused.value), "12 rows cannot be shared by 5"

    def test_bookkeeping_is_free_and_each_attempt_says_what_differed(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan(), until="foundation")
        ledger = Ledger.open(here, plan("checkpoint.keep=9", "phases.foundation.description=x"))
        assert ledger.record.attempts[-1].differences == {
            "checkpoint.keep": (3, 9),
            "phases.foundation.description": ("", "x"),
        }
        assert ledger.record.attempts[-1].inexact == {}

    @pytest.mark.requirement("C-06")
    def test_the_resolved_configuration_is_the_first_attempts(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan(), until="foundation")
        first = here.config_resolved.read_bytes()
        Ledger.open(here, plan("checkpoint.keep=9"))
        assert here.config_resolved.read_bytes() == first
        assert b"keep: 3" in first

    @pytest.mark.parametrize("content", [None, "", "run: [", "\x00"])
    def test_a_damaged_resolved_configuration_stops_nothing(
        self, plan: MakePlan, here: RunDir, content: str | None
    ) -> None:
        begin_all(Ledger.open(here, plan()), plan(), until="foundation")
        here.config_resolved.unlink() if content is None else here.config_resolved.write_text(content)
        assert Ledger.open(here, plan("run.name=x")).record.attempts[-1].differences == {"run.name": ("tales", "x")}

    def test_a_run_of_very_many_sources_can_be_gone_on_with(self, plan: MakePlan, here: RunDir) -> None:
        sources = ", ".join(f"data/{number}.jsonl" for number in range(20_000))
        many = plan(text=RUN.replace("a.jsonl", f"[{sources}]"))
        Ledger.open(here, many)
        assert Ledger.open(here, many).record.attempts[-1].differences == {}

    def test_one_is_not_true(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan("data.where.k=true")), plan("data.where.k=true"), until="foundation")
        with pytest.raises(LedgerRefuses, match=r'data\.where: was {"k": true}, is {"k": 1}'):
            Ledger.open(here, plan("data.where.k=1"))

    @pytest.mark.parametrize(
        ("both", "changed"),
        [
            pytest.param(["training.warmup_steps=5"], "training.warmup_ratio=0.5", id="overruled warm-up"),
            pytest.param([], "training.decay_ratio=0.5", id="decay of another shape"),
            pytest.param(["training.lr_scheduler=constant"], "training.min_lr_ratio=0.5", id="floor without a decay"),
            pytest.param(["phases.0.max_steps=9"], "phases.0.epochs=4", id="overruled budget"),
            pytest.param(["model.name=null", "model.from_config=a.json"], "model.from_config=moved.json", id="a path"),
            pytest.param(["lora.enabled=false"], "lora.r=4", id="no adapter"),
            pytest.param([], "data.max_line_bytes=1MB", id="a bad line stops it anyway"),
            pytest.param(["lora.target_modules=[q, v]"], "lora.target_modules=[v, q]", id="order"),
        ],
    )
    def test_a_value_that_decides_nothing_is_free(
        self, plan: MakePlan, here: RunDir, both: list[str], changed: str
    ) -> None:
        begin_all(Ledger.open(here, plan(*both)), plan(*both), until="foundation")
        assert Ledger.open(here, plan(*both, changed)).record.phases[0].state == "running"


class TestRedoing:
    def test_a_phase_and_all_that_stands_on_it_is_forgotten_and_archived(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan())
        (here.root / "merged_model").mkdir()
        changed = plan("phases.evolution.epochs=5")
        ledger = Ledger.open(here, changed, redo_from="evolution")
        assert states(here) == ["done", "pending", "pending"]
        archived = sorted(path.name for path in here.archive(1).iterdir())
        assert archived == ["merged_model", "phase2_evolution", "phase3_pr_mastery"]
        assert (here.archive(1) / "phase2_evolution/best_adapter").read_text() == "evolution"
        begin_all(ledger, changed)
        assert states(here) == ["done", "done", "done"]
        Ledger.open(here, changed, redo_from="pr_mastery")
        assert here.archive(2).is_dir(), "a second time has a place of its own"

    def test_the_folder_of_another_run_is_neither_gone_on_with_nor_redone(self, plan: MakePlan, here: RunDir) -> None:
        """Whoever named it by mistake would train over what somebody else has published."""
        begin_all(Ledger.open(here, plan()), plan())
        other = RUN.replace("tales", "songs")
        for name in ("foundation", "evolution", "pr_mastery"):
            other = other.replace(f"name: {name}", f"name: other_{name}")
        for redo_from in (None, "foundation", "other_foundation"):
            with pytest.raises(
                LedgerRefuses, match=r"this is the folder of the run tales, with other phases .*--run-dir"
            ):
                Ledger.open(here, plan(text=other), redo_from=redo_from)
        assert (here.root / "phase1_foundation").exists()
        Ledger.open(here, plan())  # the control

    def test_the_same_command_goes_on_with_a_redo_that_was_interrupted(self, plan: MakePlan, here: RunDir) -> None:
        """A requeued job has --redo-from in its command line every time it comes back."""
        begin_all(Ledger.open(here, plan()), plan())
        changed = plan("phases.evolution.epochs=5")
        begin_all(Ledger.open(here, changed, redo_from="evolution"), changed, until="pr_mastery")
        ledger = Ledger.open(here, changed, redo_from="evolution")
        assert states(here) == ["done", "done", "running"], "what is redone already is not redone again"
        begin_all(ledger, changed)
        Ledger.open(here, changed, redo_from="evolution")
        assert states(here) == ["done", "pending", "pending"], "but once it is finished, the command means another redo"

    @pytest.mark.parametrize("trouble", ["other data", "a lost folder"])
    def test_a_redo_under_way_that_was_refused_begins_anew(self, plan: MakePlan, here: RunDir, trouble: str) -> None:
        """Else the refusal would advise a command that does nothing, for ever."""
        begin_all(Ledger.open(here, plan()), plan())
        begin_all(Ledger.open(here, plan(), redo_from="foundation"), plan(), until="evolution")
        ledger = Ledger.open(here, plan(), redo_from="foundation")
        if trouble == "a lost folder":
            shutil.rmtree(here.root / "phase1_foundation")
        with pytest.raises(PhasedCptError, match="--redo-from foundation"):
            ledger.is_done(plan().phases[0], inputs(data="e" if trouble == "other data" else "d"))
        Ledger.open(here, plan(), redo_from="foundation")
        assert states(here) == ["pending", "pending", "pending"]

    def test_a_redo_under_way_with_other_values_begins_anew(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan())
        begin_all(Ledger.open(here, plan(), redo_from="evolution"), plan(), until="pr_mastery")
        Ledger.open(here, plan("phases.evolution.epochs=5"), redo_from="evolution")
        assert states(here) == ["done", "pending", "pending"]
        assert here.archive(2).is_dir()

    def test_a_merged_model_goes_with_it_wherever_it_is_in_the_run(self, plan: MakePlan, here: RunDir) -> None:
        merged = plan("merge.output_dir=out/final")
        begin_all(Ledger.open(here, merged), merged)
        (here.root / "out/final").mkdir(parents=True)
        (here.root / "phase2_evolution").rename(here.root / "elsewhere")
        (here.root / "phase2_evolution").symlink_to("nowhere")
        Ledger.open(here, merged, redo_from="evolution")
        assert (here.archive(1) / "out/final").is_dir()
        assert (here.archive(1) / "phase2_evolution").is_symlink()

    def test_an_archive_that_cannot_be_made_is_named_and_the_next_call_goes_on(
        self, plan: MakePlan, here: RunDir
    ) -> None:
        begin_all(Ledger.open(here, plan()), plan())
        (here.root / "archive").write_text("in the way")
        with pytest.raises(PhasedCptError, match=r"what is to be redone cannot be moved there: .*; make room for it"):
            Ledger.open(here, plan(), redo_from="evolution")
        (here.root / "archive").unlink()
        Ledger.open(here, plan(), redo_from="evolution")
        assert (here.archive(1) / "phase2_evolution/best_adapter").exists()

    def test_a_move_that_was_interrupted_is_finished_before_another_redo(self, plan: MakePlan, here: RunDir) -> None:
        begin_all(Ledger.open(here, plan()), plan())
        (here.root / "archive").write_text("in the way")
        with pytest.raises(PhasedCptError):
            Ledger.open(here, plan(), redo_from="evolution")
        (here.root / "archive").unlink()
        Ledger.open(here, plan(), redo_from="pr_mastery")
        assert (here.archive(1) / "phase2_evolution").is_dir()
        assert not (here.root / "phase2_evolution").exists(), "it is pending, so nothing of it may lie there"

    def test_moves_are_made_to_last(self, plan: MakePlan, here: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each folder whose list of names has changed is synced, before the record says that the move is over."""
        done: list[str] = []
        monkeypatch.setattr(book, "sync_folder", lambda path: done.append(path.name))
        monkeypatch.setattr(
            book, "publish_file", lambda path, content: (done.append(path.name), publish_file(path, content))
        )
        begin_all(Ledger.open(here, plan()), plan())
        assert done[:2] == [here.root.parent.name, "config_resolved.yaml"], "the new folder itself is made to last"
        done.clear()
        Ledger.open(here, plan(), redo_from="evolution")
        assert done == ["run.json", "1", "archive", "run.json"]

    def test_an_earlier_phase_that_does_not_match_is_refused_before_anything_moves(
        self, plan: MakePlan, here: RunDir
    ) -> None:
        begin_all(Ledger.open(here, plan()), plan())
        with pytest.raises(LedgerRefuses, match="phase foundation is done"):
            Ledger.open(here, plan("phases.foundation.epochs=5"), redo_from="evolution")
        assert states(here) == ["done", "done", "done"]
        assert not here.archive(1).exists()

    def test_a_phase_that_is_not_there_is_named(self, plan: MakePlan, here: RunDir) -> None:
        with pytest.raises(InputError, match=r"--redo-from: no run has begun in .*; leave it out"):
            Ledger.open(here, plan(), redo_from="evolution")
        Ledger.open(here, plan())
        with pytest.raises(
            InputError, match=r"this run has no phase 'evo'.*; it has foundation, evolution, pr_mastery"
        ):
            Ledger.open(here, plan(), redo_from="evo")


class TestChoosingTheFolder:
    def test_the_newest_unfinished_run_of_the_name_goes_on(self, plan: MakePlan, tmp_path: Path) -> None:
        for stamp, until in (("20260101_000000", None), ("20260102_000000", "evolution"), ("20260103_000000", None)):
            begin_all(Ledger.open(RunDir(tmp_path / f"outputs/tales-{stamp}"), plan()), plan(), until)
        begin_all(Ledger.open(RunDir(tmp_path / "outputs/tales-2-20260104_000000"), plan()), plan(), "evolution")
        assert choose_run_dir(plan()).root.name == "tales-20260102_000000"
        assert choose_run_dir(plan(), new=True).root.name > "tales-2026"
        assert not choose_run_dir(plan(), new=True).root.exists()

    def test_else_the_newest_finished_one_answers(self, plan: MakePlan, tmp_path: Path) -> None:
        for stamp in ("20260101_000000", "20260102_000000"):
            begin_all(Ledger.open(RunDir(tmp_path / f"outputs/tales-{stamp}"), plan()), plan())
        assert choose_run_dir(plan()).root.name == "tales-20260102_000000"

    def test_a_folder_that_a_crash_left_without_a_record_is_taken(self, plan: MakePlan, tmp_path: Path) -> None:
        (tmp_path / "outputs/tales-20260101_000000").mkdir(parents=True)
        assert choose_run_dir(plan()).root.name == "tales-20260101_000000"

    def test_what_is_no_run_folder_is_passed_over(self, plan: MakePlan, tmp_path: Path) -> None:
        begin_all(Ledger.open(RunDir(tmp_path / "outputs/tales-20260102_000000"), plan()), plan())
        (tmp_path / "outputs/tales-20260103_000000").write_text("a file")
        (tmp_path / "outputs/tales-20260104_000000").symlink_to("nowhere")
        (tmp_path / "outputs/my-template_abcdef").mkdir()
        assert choose_run_dir(plan()).root.name == newest_run(Path("outputs")).root.name == "tales-20260102_000000"

    def test_an_old_damaged_folder_does_not_stand_in_the_way(self, plan: MakePlan, tmp_path: Path) -> None:
        begin_all(Ledger.open(RunDir(tmp_path / "outputs/tales-20260102_000000"), plan()), plan())
        (tmp_path / "outputs/tales-20260101_000000").mkdir()
        (tmp_path / "outputs/tales-20260101_000000/run.json").write_text("{")
        assert choose_run_dir(plan()).root.name == "tales-20260102_000000"
        (tmp_path / "outputs/tales-20260101_000000").rename(tmp_path / "outputs/tales-20260103_000000")
        with pytest.raises(PhasedCptError, match="damaged"):
            choose_run_dir(plan())

    def test_a_file_is_no_run_folder(self, plan: MakePlan, call: Call) -> None:
        Path("file").write_text("x")
        with pytest.raises(InputError, match="file: this is a file, and a run needs a folder; name another"):
            choose_run_dir(plan("run.dir=file"))
        assert call("run", "-c", "run.yaml", "--run-dir", "file", "--dry-run").code == 2

    def test_a_damaged_record_is_a_run_too(self, plan: MakePlan) -> None:
        Ledger.open(RunDir(Path("mine")), plan())
        Path("mine/run.json").write_text("{")
        with pytest.raises(InputError, match=r"--new: mine .* holds a run already"):
            choose_run_dir(plan("run.dir=mine"), new=True)

    def test_two_new_runs_within_a_second_are_two_runs(self, plan: MakePlan) -> None:
        first, second = (Ledger.open(choose_run_dir(plan(), new=True), plan()).run_dir for _ in range(2))
        assert first != second
        assert choose_run_dir(plan()) == second

    def test_run_dir_rules(self, plan: MakePlan, tmp_path: Path) -> None:
        assert choose_run_dir(plan("run.dir=mine")).root == Path("mine")
        assert choose_run_dir(plan("run.dir=mine"), new=True).root == Path("mine")
        Ledger.open(RunDir(Path("mine")), plan())
        with pytest.raises(InputError, match=r"--new: mine .* holds a run already"):
            choose_run_dir(plan("run.dir=mine"), new=True)


class TestStatus:
    @pytest.fixture
    def run_dir(self, plan: MakePlan, here: RunDir) -> RunDir:
        begin_all(Ledger.open(here, plan()), plan(), until="evolution")
        return here

    def test_it_shows_how_far_a_run_has_come(self, run_dir: RunDir, call: Call) -> None:
        answer = call("status", "--run-dir", str(run_dir.root))
        assert answer.code == 0
        rows = [line.split()[:3] for line in answer.out.splitlines()[4:]]
        assert rows == [["1", "foundation", "done"], ["2", "evolution", "interrupted"], ["3", "pr_mastery", "pending"]]
        facts = json.loads(call("status", "--run-dir", str(run_dir.root), "--json").out)
        assert (facts["state"], facts["holder"], facts["attempts"]) == ("interrupted", None, 1)
        assert [phase["state"] for phase in facts["phases"]] == ["done", "interrupted", "pending"]

    def test_it_says_what_a_redo_would_move(self, run_dir: RunDir, call: Call) -> None:
        redo = ["run", "--run-dir", str(run_dir.root), "--redo-from", "foundation", "--dry-run"]
        assert "moves to archive/1: phase1_foundation" in call(*redo).out
        assert json.loads(call(*redo, "--json").out)["run"]["phases"][0]["state"] == "pending"
        assert states(run_dir) == ["done", "running", "pending"], "nothing was written"

    def test_a_run_goes_on_from_its_folder_alone_as_it_was_last_told(
        self, plan: MakePlan, run_dir: RunDir, call: Call
    ) -> None:
        longer = plan("phases.pr_mastery.epochs=3", text=RUN + "      - {name: style, sources: d.jsonl}\n")
        begin_all(Ledger.open(run_dir, longer), longer)
        go_on = ["run", "--run-dir", str(run_dir.root), "--dry-run"]
        assert call(*go_on).code == 0
        facts = json.loads(call("plan", "--run-dir", str(run_dir.root), "--json", "--set", "lora.r=4").out)
        assert [phase["budget"]["amount"] for phase in facts["phases"]] == [1, 1, 3, 1]
        assert facts["phases"][3]["lora"]["r"] == {"value": 4, "origin": "command line", "place": ""}
        assert facts["phases"][0]["model"]["name"]["place"].endswith("run.json")

    def test_what_is_typed_is_read_even_where_it_decides_nothing(self, run_dir: RunDir, call: Call) -> None:
        assert call("status", "--run-dir", str(run_dir.root), "-c", "nope.yaml").code == 2
        assert call("status", "--run-dir", str(run_dir.root), "--set", "run.sede=1").code == 2
        assert call("status", "--run-dir", str(run_dir.root), "--set", "run.seed=1").code == 0

    def test_the_home_folder_is_found(self, run_dir: RunDir, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(run_dir.root.parent))
        for verb in ("status", "plan"):
            assert call(verb, f"--run-dir=~/{run_dir.root.name}").code == 0

    def test_it_finds_the_newest_run_of_a_configuration_or_of_all(self, plan: MakePlan, call: Call) -> None:
        for name in ("tales-20260101_000000", "other-20260102_000000"):
            Ledger.open(RunDir(Path("outputs") / name), plan())
        assert call("status").out.startswith("outputs/other-20260102_000000: not begun")
        assert call("status", "-c", "run.yaml").out.startswith("outputs/tales-20260101_000000: not begun")
        assert newest_run(Path("outputs")).root.name == "other-20260102_000000"

    def test_a_moved_run_is_read_like_any_other(self, run_dir: RunDir, call: Call, tmp_path: Path) -> None:
        shutil.move(run_dir.root, tmp_path / "elsewhere")
        facts = json.loads(call("status", "--run-dir", str(tmp_path / "elsewhere"), "--json").out)
        assert (facts["name"], facts["state"]) == ("tales", "interrupted")

    @pytest.mark.parametrize("missing", ["config_resolved.yaml", "run.json", "both"])
    def test_a_half_written_run_is_read_as_far_as_it_goes(self, run_dir: RunDir, call: Call, missing: str) -> None:
        for name in ("config_resolved.yaml", "run.json") if missing == "both" else (missing,):
            (run_dir.root / name).unlink()
        answer = call("status", "--run-dir", str(run_dir.root))
        assert answer.code == 0
        assert ("interrupted" if missing == "config_resolved.yaml" else "run.json is gone") in answer.out
        shutil.rmtree(run_dir.root / "phase1_foundation")
        if missing != "config_resolved.yaml":
            assert "not begun" in call("status", "--run-dir", str(run_dir.root)).out

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"phases": 3}', "\x00" * 100])
    def test_a_damaged_record_is_named(self, run_dir: RunDir, call: Call, content: str) -> None:
        run_dir.ledger.write_text(content)
        answer = call("status", "--run-dir", str(run_dir.root))
        assert answer.code == 1
        assert f"{run_dir.ledger}: damaged, this is no record of a run" in answer.err.replace("\n", "")

    def test_a_record_of_a_newer_version_is_not_guessed_at(self, run_dir: RunDir, call: Call) -> None:
        run_dir.ledger.write_text('{"format": 99}')
        assert (
            "written by a newer phased_cpt (format 99); upgrade" in call("status", "--run-dir", str(run_dir.root)).err
        )

    def test_a_run_that_is_being_written_is_read_whole_at_any_instant(
        self, plan: MakePlan, here: RunDir, call: Call
    ) -> None:
        Ledger.open(here, plan())
        writer = os.fork()
        if writer == 0:
            while True:
                begin_all(Ledger.open(here, plan(), redo_from="foundation"), plan())
        try:
            seen = {json.loads(call("status", "--run-dir", str(here.root), "--json").out)["state"] for _ in range(300)}
        finally:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        assert len(seen) > 1, "it was being written"

    def test_a_run_at_work_says_who_is(self, run_dir: RunDir, call: Call, write: Write) -> None:
        from tests.ledger.test_locks import another_process_holds

        with another_process_holds("run_lock", run_dir.root) as holder:
            facts = json.loads(call("status", "--run-dir", str(run_dir.root), "--json").out)
        assert facts["state"] == "running"
        assert f"process {holder.pid} on" in facts["holder"]
