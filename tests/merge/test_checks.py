"""A merge that has gone wrong is not published: each check is shown what it is there to find."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phased_cpt.data.watch import Unwatched
from phased_cpt.errors import PhasedCptError
from phased_cpt.merge import shards, story
from phased_cpt.merge.adapters import Adapted
from phased_cpt.merge.check import compared
from phased_cpt.merge.pieces import Output
from phased_cpt.merge.story import merge
from phased_cpt.model.tensor_file import TensorFile
from tests.merge.conftest import Making
from tests.merge.kinds import heads, job, marker

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.requirement("M-02")]

SITES = {
    "plain": "model.layers.1.self_attn.q_proj",
    "DoRA": "model.layers.1.mlp.gate_proj",
    "embeddings": "model.embed_tokens",
    "tied, head": "lm_head",
    "GPT-2's Conv1D": "transformer.h.0.attn.c_attn",
    "experts": "model.layers.0.mlp.experts",
    "LoRA with a bias": "model.layers.0.self_attn.q_proj",
}


def require_nothing(output: Path) -> None:
    assert not output.exists() and not output.with_name(".merged_model.building").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", SITES)
def test_one_layer_that_is_merged_a_thousandth_wrong(
    kind: str, dtype: str, made: Making, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which bf16 would hide, for it rounds by more than that."""
    it, merged = made(kind), Adapted.merged
    merge(job(it.base, it.adapter, output.with_name("control"), dtype=dtype), Unwatched())

    def wrong(self: Adapted, name: str, site: Any) -> dict[str, Tensor]:
        values = merged(self, name, site)
        if name == SITES[kind]:
            for value in values.values():
                value *= 1.001
        return values

    monkeypatch.setattr(Adapted, "merged", wrong)
    with pytest.raises(PhasedCptError, match=rf"{SITES[kind]}: the merged weights are not base and adapter \(.*e-.. off"):  # fmt: skip
        merge(job(it.base, it.adapter, output, dtype=dtype), Unwatched())
    assert not output.exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_that_is_forgotten(dtype: str, made: Making, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer check asks PEFT; this one is of what was made of its answer."""
    it, pieced = made("rsLoRA"), Output._merged
    monkeypatch.setattr(
        Output, "_merged", lambda self, site: {name: self.base.read(name).float() for name in pieced(self, site)}
    )
    with pytest.raises(PhasedCptError, match=r"merged_model: the merged model is not base and adapter \(relative"):
        merge(job(it.base, it.adapter, output, dtype=dtype), Unwatched())
    require_nothing(output)


def flipped(path: Path, name: str) -> None:
    """One number of a tensor on the disk gets another exponent."""
    content = bytearray(path.read_bytes())
    head = int.from_bytes(content[:8], "little")
    at = 8 + head + json.loads(content[8 : 8 + head])[name]["data_offsets"][0] + 4 * 33 + 3
    content[at] ^= 0x03
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
)
def test_a_number_that_changes_on_the_disk_after_it_was_written(
    name: str, made: Making, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the folder is walked: of what was merged, and of what was copied."""
    it, write = made("plain"), shards.write

    def then_damaged(made_of: Output, files: list[shards.Shard], folder: Path, **more: Any) -> Any:
        notes = write(made_of, files, folder, **more)
        flipped(folder / "model.safetensors", name)
        return notes

    monkeypatch.setattr(story.files, "write", then_damaged)
    with pytest.raises(PhasedCptError, match=r"the merged model is not base and adapter"):
        merge(job(it.base, it.adapter, output), Unwatched())
    require_nothing(output)


def test_a_disk_that_keeps_other_bytes_than_it_was_given(
    made: Making, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it, write, count = made("plain"), TensorFile.write, [0]

    def wrong(self: TensorFile, part: Tensor) -> int:
        count[0] += 1
        return write(self, part.contiguous().view(torch.uint8).bitwise_xor(1) if count[0] == 7 else part)

    monkeypatch.setattr(TensorFile, "write", wrong)
    with pytest.raises(PhasedCptError, match=r"\.part: model\..* comes back from the disk as other bytes"):
        merge(job(it.base, it.adapter, output), Unwatched())
    assert not output.exists() and count[0] >= 7


def test_a_finished_file_that_was_damaged_since_is_written_again(
    made: Making, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a merge that was stopped."""
    it = made("plain")
    stopped(it.base, it.adapter, output, monkeypatch)
    building = output.with_name(".merged_model.building") / "model"
    first, second = sorted(building.glob("*.safetensors"))[:2]
    flipped(first, next(iter(heads(building)[first.name])))
    kept = second.stat().st_ino
    merge(job(it.base, it.adapter, output, shard=20_000), Unwatched())
    assert (output / second.name).stat().st_ino == kept, "the control: what is whole is kept"
    merge(job(it.base, it.adapter, output.with_name("control"), shard=20_000), Unwatched())
    control = output.with_name("control")
    assert (output / first.name).read_bytes() == (control / first.name).read_bytes()


def stopped(base: Path, adapter: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that ends before it is checked."""

    def ends(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(story, "_checked", ends)
        with pytest.raises(KeyboardInterrupt):
            merge(job(base, adapter, output, shard=20_000), Unwatched())


def test_a_folder_that_lacks_a_tensor_is_not_published(
    made: Making, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = made("plain")
    monkeypatch.setattr(
        Output,
        "__init__",
        _without(Output.__init__, "model.norm.weight"),
    )
    with pytest.raises(PhasedCptError, match=r"model\.norm\.weight is missing"):
        merge(job(it.base, it.adapter, output), Unwatched())
    assert not output.exists()


def _without(init: Callable[..., None], name: str) -> Callable[..., None]:
    def made(self: Output, *given: Any, **more: Any) -> None:
        init(self, *given, **more)
        self.pieces = [piece for piece in self.pieces if piece.copied != name]

    return made


def test_how_far_it_was_off_is_written_down(made: Making, output: Path) -> None:
    it = made("plain")
    merge(job(it.base, it.adapter, output), Unwatched())
    facts = marker(output)
    assert 0 < facts["layer_off"] <= 1e-5 and 0 < facts["logits"]["relative"] <= 1e-5
    assert facts["merged"] == 4 and facts["logits"]["exact"]
    assert "relative at most" in (output / "README.md").read_text()


# What counts as the same -------------------------------------------------------------------------------------------------

LIVE = torch.randn(2, 64, 100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "off, exact, holds",
    [(0.0, True, True), (1e-6, True, True), (1e-3, True, False), (1e-3, False, True), (0.02, False, True), (0.5, False, False)],
)  # fmt: skip
def test_what_fp32_must_hold_is_stricter_than_what_bf16_must(off: float, exact: bool, holds: bool) -> None:
    noise = torch.randn(LIVE.shape, generator=torch.Generator().manual_seed(1)) * off
    assert compared(LIVE, LIVE + noise, exact=exact).holds is holds


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_no_number_holds_never(exact: bool) -> None:
    damaged = LIVE.clone()
    damaged[0, 3, 5] = float("nan")
    assert not compared(LIVE, damaged, exact=exact).holds
    assert not compared(damaged, damaged, exact=exact).holds
    assert compared(LIVE, LIVE, exact=exact).holds
