"""A checkpoint that is not what it was when it was sealed is never trained on: it is named, and the one before is used."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from phased_cpt.errors import PhasedCptError
from phased_cpt.ledger import read_record
from phased_cpt.ledger.fingerprint import digest_of
from phased_cpt.run_dir import RunDir
from phased_cpt.sealed import fault_of
from tests.faults.conftest import Reference, Runs, Told
from tests.faults.criterion import everything, require_equal, sha256

NEWEST, BEFORE = (Path(f"run/phase2_two/checkpoints/checkpoint-{step}") for step in (2, 1))
FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json", "optimizer.safetensors", "state.json")
BEHIND = "../best-2/adapter_model.safetensors"  # of the slot that it stands on


def removed(path: Path, other: Path) -> None:
    path.unlink()


def halved(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path, other: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swapped(path: Path, other: Path) -> None:
    """With the file of that name in the checkpoint before."""
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def another(path: Path, other: Path) -> None:
    """A file that does not belong there."""
    path.write_bytes(b"what may this be")


def no_object(path: Path, other: Path) -> None:
    path.write_text("[1, 2, 3]")


Damage = Callable[[Path, Path], None]
CASES: list[tuple[str, Damage]] = [
    *((name, damage) for name in (*FILES, BEHIND) for damage in (removed, halved, emptied, flipped)),
    *((name, swapped) for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json")),
    *(("manifest.json", damage) for damage in (removed, halved, emptied, no_object)),
    *((name, another) for name in ("optimizer-0.safetensors", "model.safetensors", "._adapter_model.safetensors")),
]
FEW = {
    ("optimizer.safetensors", flipped), ("state.json", removed), ("manifest.json", halved), (BEHIND, flipped),
}  # fmt: skip


def cases() -> list[object]:
    """All of them; most when there is time."""
    return [
        pytest.param(
            name, damage, id=f"{Path(name).parent.name or 'it'} {Path(name).name} {damage.__name__}",
            marks=[] if (name, damage) in FEW else [pytest.mark.heavy],
        )
        for name, damage in CASES
    ]  # fmt: skip


@pytest.mark.requirement("R-03")
@pytest.mark.fault("F16", "each file of the newest checkpoint, of its best slot, and its manifest: removed, halved, emptied, a bit flipped, swapped with that of another step, one more", "found each time, the file named, the one before used: exact (E)")  # fmt: skip
@pytest.mark.parametrize("name, damage", cases())
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    name: str, damage: Damage, runs: Runs, reference: Reference
) -> None:
    reference.copy("two steps of two")
    damage(NEWEST / name, BEFORE / name)
    both = damage is swapped  # which damages both of them
    runs.run()
    [word, *more] = [word for word in runs.heard.words if "it is not used" in word]
    assert word.startswith(f"{NEWEST.resolve()}: ") and word.endswith("and is now checkpoint-2.damaged")
    assert Path(name).name in word
    assert len(more) == both
    assert resumed() == {"two": 0 if both else 1}
    require_equal(everything(Path("run")), reference.whole, name)


def resumed() -> dict[str, int]:
    """The steps after which the phases of the last call went on."""
    record = read_record(RunDir(Path("run")))
    assert record is not None
    return record.attempts[-1].resumed


@pytest.mark.fault("F16", "both checkpoints damaged", "told; the phase begins again from its input: exact (E)")
def test_when_no_checkpoint_is_whole_the_phase_begins_again_and_says_so(runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two")
    for folder in (NEWEST, BEFORE):
        flipped(folder / "optimizer.safetensors", folder)
    runs.run()
    assert sum("it is not used" in word for word in runs.heard.words) == 2
    assert any("no whole checkpoint is left; the phase begins again" in word for word in runs.heard.words)
    assert resumed() == {"two": 0}
    require_equal(everything(Path("run")), reference.whole, "both damaged")


@pytest.mark.fault("F16", "control: nothing damaged", "the newest is used: exact (E)")
def test_the_control_goes_on_from_the_newest(runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two")
    runs.run()
    assert not any("it is not used" in word for word in runs.heard.words)
    assert resumed() == {"two": 2}
    require_equal(everything(Path("run")), reference.whole, "the control")


@pytest.mark.fault(
    "F16",
    "every bit of the manifest, one at a time",
    "found, but for blanks and line ends",
)
def test_no_bit_of_a_manifest_that_means_something_changes_unseen(reference: Reference, told: Told) -> None:
    reference.copy("two steps of two")
    path = NEWEST / "manifest.json"
    whole = path.read_bytes()
    manifest = json.loads(whole)
    assert fault_of(NEWEST, manifest["fingerprint"]) is None, "the control"
    unseen = []
    for at in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[at] ^= 1 << bit
            path.write_bytes(content)
            if fault_of(NEWEST, manifest["fingerprint"]) is None:
                now = json.loads(content)
                unseen += [key for key in {*now, *manifest} if now.get(key) != manifest.get(key)]
    assert unseen == []
    told(f"{8 * len(whole)} bits of a manifest", 8 * len(whole))


# Pickles ----------------------------------------------------------------------------------------------------------------

PICKLES = (
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "adapter_model.bin",
    "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
)  # fmt: skip


class Canary:
    """Whoever loads it makes a file."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (Path("sung").resolve(),))


def listed(folder: Path, *names: str) -> None:
    """In the manifest, as if it had been sealed with them."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    files = {file.name: [file.stat().st_size, sha256(file)] for file in folder.iterdir() if file != path}
    manifest = {key: value for key, value in manifest.items() if key != "digest"} | {"files": files}
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))


@pytest.mark.requirement("R-05")
@pytest.mark.fault("F18", "a pickle under every name that a library may look for, beside what was sealed, or sealed with it", "never loaded: exact (E)")  # fmt: skip
@pytest.mark.parametrize("sealed", [False, True])
def test_a_pickle_in_a_checkpoint_is_never_loaded(sealed: bool, runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two")
    for name in PICKLES:
        (NEWEST / name).write_bytes(pickle.dumps(Canary()))
    if sealed:
        listed(NEWEST)
    runs.run()
    assert resumed() == {"two": 2 if sealed else 1}
    assert not Path("sung").exists()
    require_equal(everything(Path("run")), reference.whole, "with pickles")
    pickle.loads(pickle.dumps(Canary()))
    assert Path("sung").exists(), "the control: whoever loads it is heard"


@pytest.mark.fault("F18", "a pickle sealed in the place of the weights", "refused, and never loaded")
@pytest.mark.parametrize("weights", ["adapter_model.bin", "pytorch_model.bin"])
def test_a_pickle_in_the_place_of_the_weights_is_never_loaded(weights: str, runs: Runs, reference: Reference) -> None:
    reference.copy("two steps of two")
    shutil.rmtree(BEFORE)
    (NEWEST / "adapter_model.safetensors").unlink()
    (NEWEST / weights).write_bytes(pickle.dumps(Canary()))
    listed(NEWEST)
    with pytest.raises(PhasedCptError):
        runs.run()
    assert not Path("sung").exists()
    assert not Path("run/phase2_two/best_adapter").exists()
