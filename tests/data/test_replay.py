"""Replay and mixtures: the budget is kept, the shares are what was planned, and every token is counted."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phased_cpt.config import from_record
from phased_cpt.data.blocks import IGNORED, Blocks, Shape
from phased_cpt.data.composed import Part
from phased_cpt.data.index import Packing, Share, block_index
from phased_cpt.data.mixing import row_order
from phased_cpt.data.packing import PACKERS
from phased_cpt.data.prepare import prepare
from phased_cpt.data.prepared import PreparedPhase, PreparedSplit
from phased_cpt.data.replay import Whole, old_parts, own_parts, packer, whole_phase
from phased_cpt.data.tokens import TokenStore
from phased_cpt.errors import InputError
from phased_cpt.plan import PhasePlan, make_plan
from phased_cpt.schedule import Prepared
from tests.conftest import Call, Write
from tests.data.conftest import Prepare, lines

# Sources whose tokens say where they come from: 1000 … 1999 of the first one, 2000 … of the second.
SOURCE = 1000


def store(folder: Path, number: int, lengths: Sequence[int], chats: bool = False) -> TokenStore:
    """Documents of these lengths; the digest of one is its number, which no other source has.

    In chats every third token is not what the assistant says.
    """
    place = folder / "tokens" / f"store{number}"
    place.mkdir(parents=True)
    (SOURCE * number + np.arange(sum(lengths)) % SOURCE).astype(np.uint16).tofile(place / "ids.bin")
    np.save(place / "offsets.npy", np.append(0, np.cumsum(lengths)))
    np.save(place / "digests.npy", np.arange(len(lengths), dtype=np.uint64) + np.uint64(SOURCE * number))
    facts = {"dtype": "uint16", "documents": len(lengths)}
    if chats:
        (np.arange(sum(lengths)) % 3 > 0).tofile(place / "said.bin")
        facts["said"] = True
    return TokenStore(f"source{number}", place, facts, True, 0.0)


def plans(**phase: Any) -> list[PhasePlan]:
    """Two phases to draw from, and one that draws."""
    own = {"sources": ["x"], **phase}
    phases = [{"name": "a", "sources": ["x", "y"]}, {"name": "b", "sources": "x"}, {"name": "c", **own}]
    given = {"model": {"name": "m"}, "training": {"global_batch_size": 4, "micro_batch_size": 1}, "phases": phases}
    return list(make_plan(from_record({**given, "data": {"max_tokens": 64, "max_repeats": 1e6}}, "page")).phases)


class Drawing:
    """What phase c comes to, and its rows looked at one by one."""

    def __init__(self, case: dict[str, Any], folder: Path) -> None:
        self.phases = plans(**case["phase"])
        self.held_out = np.array(case["held_out"], np.uint64)
        shape = Shape(case["capacity"], 1, 2, case["train_context"])
        how = Packing(case["packer"], case["overlap"], True, not self.phases[2].settings.data.shuffle, shape)
        stores = [store(folder, at + 1, lengths, at == case["chats"]) for at, lengths in enumerate(case["lengths"])]
        weights = iter(case["weights"])
        shares = [
            Share(each, np.arange(each.facts["documents"]), next(weights), ("seed", at))
            for at, each in enumerate(stores)
        ]
        apart = packer(how, folder, print)
        a, b, c = self.phases
        own = own_parts(c, shares[3:], lambda each: block_index(each, how, folder, print), apart)
        drawn = {"a": (a, shares[:2]), "b": (b, shares[2:3])}
        names = list(c.phase.replay) if isinstance(c.phase.replay, dict) else ["a", "b"] if c.phase.replay else []
        old = {name: old_parts(c, *drawn[name], self.held_out, apart) for name in names}
        self.own: list[Part] = own
        self.whole: Whole = whole_phase(c, own, old, folder, print)
        self.split = PreparedSplit(self.whole.index, tuple(shares[3:]), 0.0, self.whole.parts, self.whole.epochs)
        self.blocks: Blocks = self.whole.index.blocks
        self.rows = [self.blocks[at] for at in range(len(self.blocks))]

    def trained(self) -> Counter[int]:
        """Labels by source, as a loop over the rows finds them."""
        found: Counter[int] = Counter()
        for row in self.rows:
            found.update((row["labels"][row["labels"] != IGNORED] // SOURCE).tolist())
        return found


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    capacity = draw(st.integers(4, 24))
    several = draw(st.booleans())
    documents = st.lists(st.integers(2, 60), min_size=3, max_size=12)
    budget: dict[str, float] = draw(
        st.sampled_from([{"tokens": 900}, {"max_steps": 12}, {"epochs": 2.5}, {"tokens": 2777}])
    )
    replay = draw(st.sampled_from([0.05, 0.25, 0.9, {"a": 0.1}, {"a": 0.2, "b": 0.3}, {"b": 0.5}, None]))
    data = {"shuffle": draw(st.booleans()), "temperature": draw(st.sampled_from([1.0, 2.0, 0.5]))}
    return {
        "capacity": capacity,
        "overlap": draw(st.integers(0, capacity - 1)),
        "packer": draw(st.sampled_from(sorted(PACKERS))),
        "train_context": draw(st.booleans()),
        "chats": draw(st.sampled_from([None, 1, 3])),
        "lengths": [draw(documents) for _ in range(5 if several else 4)],
        "weights": [draw(st.sampled_from([1.0, 0.5, 2.5])) for _ in range(5)],
        "held_out": draw(st.lists(st.sampled_from([1000, 1001, 2000, 3000]), max_size=4)),
        "phase": {"sources": ["x", "y"] if several else ["x"], "replay": replay, "data": data, **budget},
    }


def planned(drawing: Drawing) -> Iterator[tuple[float, float]]:
    """Of each part, the share that was planned and the one that came of it."""
    tokens = iter(drawing.split.drawn("c"))
    for part in drawing.whole.parts:
        yield part.share, sum(next(tokens).tokens for _ in part.sources) / drawing.whole.index.account.tokens_trained


@pytest.mark.requirement("D-05")
@settings(max_examples=40)
@given(case=cases())
def test_what_is_planned_is_what_is_counted_and_what_a_loop_over_the_rows_sees(case: dict[str, Any]) -> None:
    """For any packer, overlap, shares, weights and budget: by source, and to the token."""
    with TemporaryDirectory() as folder:
        drawing = Drawing(case, Path(folder))
        account, seen = drawing.whole.index.account, drawing.trained()
        drawn = drawing.split.drawn("c")
        assert sum(seen.values()) == account.tokens_trained == sum(each.tokens for each in drawn)
        assert {int(each.source[6:]): each.tokens for each in drawn if each.tokens} == dict(seen)
        assert len(drawing.rows) == account.blocks
        assert all((row["labels"] != IGNORED).any() for row in drawing.rows), "no step is empty"
        budget = drawing.phases[2].budget
        if budget.unit == "steps":
            assert account.blocks == 4 * budget.amount
        elif budget.unit == "tokens":
            assert account.tokens_trained == budget.amount
        else:
            once = sum(part.rows.tokens * part.weight for part in drawing.own)
            assert abs(account.tokens_trained - 2.5 * once) <= 2
        near = max(0.001, len(drawing.whole.parts) / account.tokens_trained)
        assert all(abs(plan - came) <= near for plan, came in planned(drawing))
        assert sum(plan for plan, _ in planned(drawing)) == pytest.approx(1)
        for number, held in ((at // SOURCE, at % SOURCE) for at in drawing.held_out.tolist()):
            of = [at for at, source in enumerate(drawing.split.sources) if source.store.name == f"source{number}"]
            for at in of:
                offsets = drawing.split.sources[at].store.offsets
                starts = drawing.blocks.slices.start[drawing.blocks.slices.store == at]
                assert not ((starts >= offsets[held]) & (starts < offsets[held + 1])).any(), "held out, and trained"


CASE: dict[str, Any] = {
    "capacity": 8, "overlap": 0, "packer": "best_fit", "train_context": False, "held_out": [], "chats": None,
    "lengths": [[9] * 20, [5] * 20, [8] * 40, [8] * 90], "weights": [1.0] * 5,
}  # fmt: skip


def test_a_document_that_is_held_out_would_be_seen_by_that_test(tmp_path: Path) -> None:
    """The control of the property above."""
    drawing = Drawing(CASE | {"phase": {"replay": {"a": 0.5}, "tokens": 600}}, tmp_path)
    starts = drawing.blocks.slices.start[drawing.blocks.slices.store == 1]
    assert (starts == 0).any()


@pytest.mark.parametrize("shuffle", [True, False])
def test_replay_is_spread_evenly_and_the_phase_keeps_its_own_order(tmp_path: Path, shuffle: bool) -> None:
    drawing = Drawing(CASE | {"phase": {"replay": {"b": 0.1}, "epochs": 2, "data": {"shuffle": shuffle}}}, tmp_path)
    whose = [int(row["input_ids"][0]) // SOURCE for row in drawing.rows]
    old = [at for at, source in enumerate(whose) if source == 3]
    assert len(old) == 18 and {len(drawing.rows)} == {180}
    assert {after - before for before, after in itertools.pairwise(old)} == {10}
    own = [
        int(row["input_ids"][0]) % SOURCE // 8 for row, source in zip(drawing.rows, whose, strict=True) if source == 4
    ]
    order = row_order(90, 2, *drawing.phases[2].data_seed, shuffle=shuffle).tolist()
    assert own == order[:162], "as without replay, and cut where its share ends"
    assert own != order[-162:], "the control"
    assert sorted(old_row := [whose[at] for at in old]) == old_row


def test_the_last_row_is_cut_where_the_share_ends_and_that_is_no_end_of_a_document(tmp_path: Path) -> None:
    case = CASE | {"lengths": [[8], [8], [8] * 4, [8] * 50], "phase": {"replay": {"b": 0.1}, "tokens": 100}}
    drawing = Drawing(case, tmp_path)
    short = [row for row in drawing.rows if row["labels"][-1] == IGNORED]
    assert [int((row["labels"] != IGNORED).sum()) for row in short] == [3, 6], "10 of the old (7 + 3), 90 of the own"
    assert short[0]["input_ids"].tolist()[4:] == [2] * 4, "padding, and no EOS"


def test_a_temperature_evens_the_sources_out(tmp_path: Path) -> None:
    """Sources of 70 and 280 tokens: 0.2 and 0.8; at temperature 2, 1/3 and 2/3; an epoch stays as long."""
    lengths = [[8], [8], [8], [8] * 10, [8] * 40]
    phase = {"sources": ["x", "y"], "data": {"temperature": 2.0}, "epochs": 1}
    drawing = Drawing(CASE | {"lengths": lengths, "phase": phase}, tmp_path)
    assert [(each.tokens, round(each.epochs, 2)) for each in drawing.split.drawn("c")] == [(117, 1.67), (233, 0.83)]
    assert drawing.whole.epochs == 1.0


# Through prepare ----------------------------------------------------------------------------------------------------

OLD = [{"text": f"old document {at}, " + "once more " * (at % 40)} for at in range(150)]
NEW = [{"text": f"a new one {at}, " + "and another " * (at % 30)} for at in range(150)]
REPLAY = ("phases.phase_1.replay=0.2",)


def rows(phase: PreparedPhase) -> list[list[int]]:
    blocks = phase.train.index.blocks
    return [blocks[at]["input_ids"].tolist() for at in range(len(blocks))]


def with_files(write: Write) -> None:
    write(lines(*OLD), "old.jsonl")
    write(lines(*NEW), "new.jsonl")


def test_without_replay_and_temperature_everything_is_where_it_was(prepared: Prepare, write: Write) -> None:
    """The keys of what an older release has prepared: it is found, and the fingerprints of its runs hold."""
    with_files(write)
    run = prepared("old.jsonl", "new.jsonl")
    assert [phase.train.index.folder.name for phase in run.phases] == [
        "36feaca0dfcb87eb420fde4562cba0cf",
        "c3c312b675449ab61f3173afeabdd023",
    ]
    assert [list(phase.source_digests) for phase in run.phases] == [["sources.0"], ["sources.0"]]
    again = prepared("old.jsonl", "new.jsonl", set_=("data.temperature=1", "data.max_repeats=9"))
    assert [phase.train.index.folder for phase in again.phases] == [phase.train.index.folder for phase in run.phases]
    other = prepared("old.jsonl", "new.jsonl", set_=REPLAY)
    assert other.phases[0].train.index.folder == run.phases[0].train.index.folder
    assert other.phases[1].train.index.folder != run.phases[1].train.index.folder, "the control"


@pytest.mark.requirement("D-05")
@pytest.mark.parametrize("packing", sorted(PACKERS))
def test_a_phase_with_replay_has_its_steps_and_says_what_it_draws(
    prepared: Prepare, write: Write, packing: str, call: Call
) -> None:
    with_files(write)
    batch = ("training.global_batch_size=4", "training.micro_batch_size=1")
    plain, mixed = (
        prepared("old.jsonl", "new.jsonl", set_=(*batch, *more), packing=packing).phases[1] for more in ((), REPLAY)
    )
    steps = [phase.plan.budget.steps(4, phase.epoch) or 0 for phase in (plain, mixed)]
    assert abs(steps[0] - steps[1]) <= (2 if packing != "none" else 20)
    assert mixed.epoch == Prepared(mixed.train.index.account.blocks, mixed.train.index.account.tokens_trained, 0.8)
    answer = call(
        "prepare", "-c", "run.json", *(word for each in (*batch, *REPLAY) for word in ("--set", each)), "--json"
    )
    facts = json.loads(answer.out)["phases"][1]
    trained = facts["splits"]["train"]["tokens_trained"]
    assert facts["whole_phase"]
    assert abs(trained - plain.train.index.account.tokens_trained) <= 64
    (old,), (new,) = facts["replay"], facts["mixture"]
    assert (old["phase"], old["planned_share"], new["source"], new["planned_share"]) == (
        "phase_0",
        0.2,
        "new.jsonl",
        0.8,
    )
    assert abs(old["share"] - 0.2) < 0.001 and old["tokens"] + new["tokens"] == trained
    shown = call("prepare", "-c", "run.json", *(word for each in (*batch, *REPLAY) for word in ("--set", each))).out
    assert "phase_0 (replay)" in shown and "20.00%" in shown


def test_the_seed_of_the_run_decides_what_is_replayed(prepared: Prepare, write: Write) -> None:
    with_files(write)
    first, again, other = (
        rows(prepared("old.jsonl", "new.jsonl", set_=(*REPLAY, f"run.seed={seed}")).phases[1]) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_what_a_phase_or_one_before_it_holds_out_is_not_replayed(prepared: Prepare, write: Write) -> None:
    """Ten documents of phase 0's sources are the held-out ones of phase 1. What a later phase holds out may yet change."""
    with_files(write)
    write(lines(*OLD[:10], {"text": "and one more"}), "held.jsonl")
    own = ("phases.1.eval_sources=held.jsonl", "phases.1.replay=0.9", "phases.1.epochs=3", "data.max_repeats=99")
    run = prepared("old.jsonl", "new.jsonl", "new.jsonl", set_=own)

    def found(phase: PreparedPhase) -> int:
        texts = " ".join(run.tokenizer.reference.decode(row) for row in rows(phase))
        return sum(f"old document {at}," in texts for at in range(10))

    assert found(run.phases[1]) == 0
    assert found(run.phases[0]) > 7, "the control: phase 0 trains them"
    free = prepared("old.jsonl", "new.jsonl", set_=own[1:]).phases[1]
    assert found(free) > 7, "the control: nobody holds them out"
    later = prepared("old.jsonl", "new.jsonl", "new.jsonl", set_=("phases.2.eval_sources=held.jsonl", *own[1:])).phases[
        1
    ]
    assert later.source_digests == free.source_digests, "a phase that is appended changes none that is done"


def test_what_is_replayed_is_in_the_fingerprint(prepared: Prepare, write: Write) -> None:
    with_files(write)
    before = prepared("old.jsonl", "new.jsonl", set_=REPLAY).phases[1].source_digests
    write(lines(*OLD[1:]), "old.jsonl")
    after = prepared("old.jsonl", "new.jsonl", set_=REPLAY).phases[1].source_digests
    assert before["sources.0"] == after["sources.0"]
    assert before["replay.phase_0.0"] != after["replay.phase_0.0"]


@pytest.mark.parametrize(
    ("replay", "mend"),
    [
        ("0.9", r"^phases.phase_1.replay: [\d,]+ tokens of phase_0 are 8.\d passes over it, and data.max_repeats is 4; "
                r"take a share of 0.4\d+, or data.max_repeats: 9$"),
        ("{phase_0: 0.9}", "or data.max_repeats: 9$"),
    ],
)  # fmt: skip
def test_replay_is_not_repeated_without_being_asked(prepared: Prepare, write: Write, replay: str, mend: str) -> None:
    write(lines(*OLD[:50]), "old.jsonl")
    write(lines(*NEW), "new.jsonl")
    own = (f"phases.phase_1.replay={replay}", "phases.phase_1.epochs=3.2")
    with pytest.raises(InputError, match=mend):
        prepared("old.jsonl", "new.jsonl", set_=own)
    prepared("old.jsonl", "new.jsonl", set_=(*own, "data.max_repeats=9"))


def test_few_tokens_cannot_hold_their_shares_and_that_is_said(call: Call, prepared: Prepare, write: Write) -> None:
    with_files(write)
    prepared("old.jsonl", "new.jsonl")
    few = ("--set", "phases.phase_1.replay=0.05", "--set", "phases.phase_1.tokens=70")
    out = call("prepare", "-c", "run.json", *few).out
    assert "5.71% of its 70 tokens are of old.jsonl, and 5.00% were planned" in " ".join(out.split())
    assert "were planned" not in call("prepare", "-c", "run.json", *few[:-1], "phases.phase_1.tokens=2000").out


def test_the_control_of_a_phase_has_as_many_rows_and_nothing_new(prepared: Prepare, write: Write) -> None:
    with_files(write)
    prepared("old.jsonl", "new.jsonl")
    for more in ([], ["phases.phase_1.max_steps=5"], ["phases.phase_1.replay=0.3"]):
        given = json.loads(Path("run.json").read_text())
        given["training"] = {"global_batch_size": 4, "micro_batch_size": 1}
        for each in more:
            key, value = each.removeprefix("phases.phase_1.").split("=")
            given["phases"][1][key] = json.loads(value)
        plan = make_plan(from_record(given, "page"))
        phase = prepare(plan, workers=1).phase("phase_1")
        control = prepare(plan, workers=1, control="phase_1").phase("phase_1")
        assert phase.plan.budget.steps(4, phase.epoch) == control.plan.budget.steps(4, control.epoch)
        assert control.train.index.account.blocks == (
            20 if "max_steps" in str(more) else phase.train.index.account.blocks
        )
        assert {each.phase for each in control.train.drawn("phase_1")} == {"phase_0"}
        assert control.eval is not None and control.eval.index.folder == phase.eval.index.folder  # type: ignore[union-attr]
    with pytest.raises(InputError, match="phase_0 is the first phase: there is nothing before it"):
        prepare(plan, workers=1, control="phase_0")
