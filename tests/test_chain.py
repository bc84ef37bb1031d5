"""What a run has added to its base, up to a phase: read off its record."""

import json
from pathlib import Path
from typing import Any

import pytest

from phased_cpt.chain import Chain, chain_of, require_straight
from phased_cpt.errors import InputError
from phased_cpt.ledger import Adapter, PhaseRecord, Weights


def adapter(root: Path, number: int, **config: Any) -> Adapter:
    """One that a phase has published, as far as it is looked at."""
    folder = root / f"phase{number}_p/best_adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "bias": "none", **config}))
    return Adapter(digest=f"a{number}", folder=f"phase{number}_p/best_adapter")


def record(number: int, published: Weights, merged: str | None = None) -> PhaseRecord:
    handed_over = Weights(kind="base", base=merged, folder=f"phase{number}_p/merged_base") if merged else None
    return PhaseRecord(name=f"p{number}", folder=f"phase{number}_p", published=published, handed_over=handed_over)


def on(base: str, *adapters: Adapter, folder: str = "") -> Weights:
    return Weights(kind="adapter", base=base, adapters=adapters, folder=folder)


def test_adapters_through_two_merges_are_all_of_the_change(tmp_path: Path) -> None:
    one, two, three = (adapter(tmp_path, number) for number in (1, 2, 3))
    records = [
        record(1, on("base", one), merged="m1"),
        record(2, on("m1", two, folder="phase1_p/merged_base"), merged="m2"),
        record(3, on("m2", three, folder="phase2_p/merged_base")),
    ]
    found = [chain_of(tmp_path, each.published, records) for each in records if each.published]
    assert found == [
        Chain((one,)),
        Chain((one, two), through_merges=True),
        Chain((one, two, three), through_merges=True),
    ]


def test_a_stack_has_all_of_its_adapters_and_needs_no_merge(tmp_path: Path) -> None:
    one, two = adapter(tmp_path, 1), adapter(tmp_path, 2)
    assert chain_of(tmp_path, on("base", one, two), []) == Chain((one, two))


def test_below_whole_weights_nothing_else_is_looked_at(tmp_path: Path) -> None:
    one, three = adapter(tmp_path, 1), adapter(tmp_path, 3)
    whole = Weights(kind="base", base="w", folder="phase2_p/best_model")
    records = [record(1, on("base", one), merged="m1"), record(2, whole)]
    assert chain_of(tmp_path, on("w", three, folder=whole.folder), records) == Chain((three,), whole.folder, "w")


def test_a_dora_that_was_merged_stands_as_whole_weights_and_one_on_top_is_refused(tmp_path: Path) -> None:
    """The half of its numbers is not the half of its change; of merged weights every part is."""
    one, two = adapter(tmp_path, 1, use_dora=True), adapter(tmp_path, 2)
    records = [record(1, on("base", one), merged="m1")]
    merged = "phase1_p/merged_base"
    assert chain_of(tmp_path, on("m1", two, folder=merged), records) == Chain((two,), merged, "m1")
    require_straight([tmp_path / two.folder])
    for number, config in enumerate(({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}), 3):
        with pytest.raises(InputError, match=r"is not a part of what it changes; merge it"):
            require_straight([tmp_path / adapter(tmp_path, number, **config).folder])
