"""A base that is moved towards other whole weights, so far, with adapters on top."""

from pathlib import Path

import pytest
import torch

from phased_cpt.data.watch import Unwatched
from phased_cpt.errors import InputError
from phased_cpt.merge.story import merge
from phased_cpt.merging import Layer
from phased_cpt.published import weights_digest
from tests.merge.conftest import Making
from tests.merge.kinds import KINDS, job, marker, plain, tensors, write_base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def trained_whole(base: Path, folder: Path) -> Path:
    """As a phase leaves it that has trained every weight."""
    model, generator = plain(base), torch.Generator().manual_seed(7)
    for param in model.parameters():
        param.data += torch.randn(param.shape, generator=generator) * 0.05
    model.save_pretrained(folder)
    return folder


@pytest.mark.requirement("M-01")
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["plain", "tied, embeddings whole", "experts", "GPT-2's Conv1D"])
def test_every_weight_lies_so_far_between_the_two(
    kind: str, strength: float, made: Making, output: Path, tmp_path: Path
) -> None:
    base = made(kind).base
    other = trained_whole(base, tmp_path / "other")
    merge(job(base, [], output, toward=Layer(str(other), weights_digest(other), strength)), Unwatched())
    here, there, found = tensors(base), tensors(other), tensors(output)
    assert found.keys() == here.keys() == there.keys()
    assert all(torch.equal(found[name], torch.lerp(here[name], there[name], strength)) for name in here)
    assert marker(output)["toward"]["scale"] == strength
    assert not any(torch.equal(here[name], there[name]) for name in here), "the control"


def test_an_adapter_on_top_is_as_strong_as_is_said(made: Making, output: Path, tmp_path: Path) -> None:
    it = made("plain")
    other = trained_whole(it.base, tmp_path / "other")
    toward = Layer(str(other), weights_digest(other), 0.5)
    merge(job(it.base, it.adapter, output, scales={it.adapter: 0.5}, toward=toward), Unwatched())
    name = "model.layers.1.mlp.down_proj"
    a, b = (tensors(it.adapter)[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    here, there = (tensors(folder)[f"{name}.weight"].double() for folder in (it.base, other))
    found = tensors(output)[f"{name}.weight"].double()
    assert float((found - (here + there) / 2 - 0.5 * 2 * b @ a).abs().max()) < 1e-6
    assert float((found - (here + there) / 2 - 0.25 * 2 * b @ a).abs().max()) > 1e-3, (
        "the control: a half of each factor"
    )


def test_weights_of_another_architecture_are_refused(made: Making, output: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", KINDS["plain"].model, {"intermediate_size": 48})
    with pytest.raises(InputError, match="not weights of the same architecture"):
        merge(job(made("plain").base, [], output, toward=Layer(str(other), weights_digest(other), 0.5)), Unwatched())
    assert not output.exists()
