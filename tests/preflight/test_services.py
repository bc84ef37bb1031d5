"""The hub, Weights & Biases and the packages: each answer has another remedy. The servers are ours, on this machine."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from packaging.requirements import Requirement

from phased_cpt.preflight import CHECKS, packages, seen_by
from phased_cpt.preflight.seen import Seen
from tests.preflight.conftest import LINES, SHAPE, Gpus, seen_scene, server

KEY = "0123456789abcdef" * 2 + "01234567"


def seen(name: str, **sections: Any) -> list[Seen]:
    return list(seen_by(CHECKS[name], seen_scene(**sections)))


def base_of_the_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> Seen:
    for name, value in {
        "ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(Path("hub").resolve()),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    (found,) = seen("base", model={"name": "some/model", "from_config": None})
    return found


@pytest.mark.parametrize(
    ("code", "error", "found", "fix"),
    [
        (404, "RepoNotFound", "the hub has no some/model (404), or does not show it", "set HF_TOKEN if it is private"),
        (401, "RepoNotFound", "the hub has no some/model (404), or does not show it", "look at the spelling"),
        (403, "GatedRepo", "some/model is gated", "accept its terms on http"),
        (404, "RevisionNotFound", "some/model has no revision", "name a branch, a tag or a commit of it"),
        (400, "", "the hub answers", "try again later"),
    ],
)
def test_what_the_hub_refuses(
    code: int, error: str, found: str, fix: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(code, X_Error_Code=error) as endpoint:
        answer = base_of_the_hub(monkeypatch, endpoint)
    assert answer.verdict == "fail"
    assert found in answer.found
    assert fix in answer.fix


def test_a_hub_that_cannot_be_reached_is_told_from_one_that_refuses(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = base_of_the_hub(monkeypatch, "http://127.0.0.1:9")
    assert answer.verdict == "fail"
    assert "the hub cannot be reached" in answer.found
    assert "HF_HUB_OFFLINE=1" in answer.fix


def test_a_base_that_is_not_downloaded_yet_is_only_looked_at(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 GB, nothing but config.json: the server has nothing else to give."""
    commit, snapshot = "c" * 40, Path("hub/models--some--model/snapshots") / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(SHAPE))
    sizes = {
        "config.json": 500,
        "model-1.safetensors": 12_000_000_000,
        "model-2.safetensors": 8_000_000_000,
        "a.bin": 9,
    }
    files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    headers = {"X_Repo_Commit": commit, "ETag": '"e"'}
    with server(200, {"id": "some/model", "sha": commit, "siblings": files}, **headers) as endpoint:
        answer = base_of_the_hub(monkeypatch, endpoint)
    assert answer.verdict == "warn"
    assert "commit cccccccccccc: the run downloads 20.0 GB first" in answer.found
    assert answer.fix.startswith("hf download some/model")


WHO = {"data": {"viewer": {"username": "ada"}}}


@pytest.mark.parametrize(
    ("code", "body", "verdict", "found"),
    [
        (200, WHO, "ok", ", as ada"),
        (200, {"data": {"viewer": None}}, "fail", "does not know this key"),
        (403, None, "fail", "does not know this key (403)"),
        (500, None, "warn", "answers 500; training goes on without it"),
    ],
)
def test_what_weights_and_biases_says_of_a_key(
    code: int, body: Any, verdict: str, found: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(code, body) as address:
        Path("netrc").write_text(f"machine {address.removeprefix('http://')} login user password {KEY}\n")
        monkeypatch.setenv("WANDB_BASE_URL", address)
        (answer,) = seen("W&B", tracking={"wandb": {"enabled": True}})
    assert (answer.verdict, found in answer.found) == (verdict, True), answer
    assert KEY not in answer.found + answer.fix


def test_weights_and_biases_without_a_key_or_a_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (auto,) = seen("W&B", tracking={"wandb": {"enabled": True}})
    (offline,) = seen("W&B", tracking={"wandb": {"enabled": True, "mode": "offline"}})
    (online,) = seen("W&B", tracking={"wandb": {"enabled": True, "mode": "online"}})
    assert [auto.verdict, offline.verdict, online.verdict] == ["warn", "ok", "fail"]
    assert "no key, so offline" in auto.found
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (unreached,) = seen("W&B", tracking={"wandb": {"enabled": True}})
    assert unreached.verdict == "warn"
    assert "cannot be reached" in unreached.found


def test_packages_are_held_against_their_ranges_and_the_tested_pins(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [each.verdict for each in seen("packages")] == ["ok"], "the control"
    monkeypatch.setattr(packages, "_ranges", lambda: {"peft": Requirement("peft>=99")})
    (old,) = seen("packages")
    assert old.verdict == "fail"
    assert old.found.endswith("is installed, and >=99 is needed")
    assert old.fix == 'pip install "peft>=99"'
    monkeypatch.undo()
    monkeypatch.chdir(here)
    Path("pins.txt").write_text("# tested\npeft==0.1.0\n")
    monkeypatch.setattr(packages, "PINS", Path("pins.txt"))
    (new,) = seen("packages")
    assert new.verdict == "warn"
    assert "is newer than the 0.1.0 that this release was tested with" in new.found


def test_packages_are_asked_for_by_what_uses_them(here: Path) -> None:
    def needed(**sections: Any) -> set[str]:
        return set(packages.needed_by(seen_scene(**sections).plan)) - set(packages.ALWAYS)

    assert needed(tracking={"tensorboard": {"enabled": False}}) == set(), "the control"
    assert needed() == {"tensorboard"}
    assert needed(tracking={"wandb": {"enabled": True}}) == {"tensorboard", "wandb"}
    assert needed(training={"optimizer": "paged_adamw_8bit"}) == {"tensorboard", "bitsandbytes"}
    assert needed(training={"loss": "liger"}) == {"tensorboard", "liger-kernel"}


def test_the_gpus_are_those_that_this_call_may_use(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is at work on the first one, which is none of ours."""
    gpus(4, free=40500, at_work="4242, python, 40000")
    (first, second) = seen("GPU memory", launch={"num_gpus": 2})
    assert "python (4242) holds 41.9 GB" in first.found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3,GPU-2")
    others = seen("GPU memory", launch={"num_gpus": 2})
    assert [each.found.partition(":")[0] for each in others] == ["GPU 3", "GPU 2"]
    assert not any("4242" in each.found for each in others)
    assert "GPU 1" in second.found


def test_sources_that_lie_here_are_counted(here: Path) -> None:
    Path("b.jsonl").write_text(LINES)
    phases = [{"name": "one", "sources": ["a.jsonl", "b.jsonl"], "max_steps": 100}]
    assert [each.found for each in seen("sources", phases=phases)] == ["2 files"]
