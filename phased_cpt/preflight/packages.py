"""The packages that this configuration needs, by their metadata: nothing of them is imported."""

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from phased_cpt.children import HERE
from phased_cpt.nodes.identity import PACKAGES
from phased_cpt.plan import Plan
from phased_cpt.preflight.plan import offloads
from phased_cpt.preflight.scene import Scene
from phased_cpt.preflight.seen import Seen, fail, ok, warn

OURS = "phased-cpt"
PINS = HERE / "constraints.txt"  # in a checkout; a wheel has only the ranges
ALWAYS = ("torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "tokenizers", "huggingface-hub")
ATTENTION = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}
NEVER_STOPS = ("wandb", "tensorboard")  # a sink that is missing is told once, and training goes on


def packages(scene: Scene) -> Iterator[Seen]:
    """Each is there, in the range that this release takes; and which differ from what it was tested with."""
    needed, ranges, pins = needed_by(scene.plan), _ranges(), _pins(PINS)
    seen = [*(_package(name, ranges.get(name), pins.get(name)) for name in needed)]
    wrong = [each for each in seen if each is not None]
    yield from wrong
    if not wrong:
        yield ok(", ".join(f"{name} {importlib.metadata.version(name)}" for name in needed))


def compiler(scene: Scene) -> Iterator[Seen]:
    """What is compiled when it is first used: flex attention, and what DeepSpeed has for an offload."""
    flex = _may_be_flex(scene) and not scene.probe.missing and scene.probe.given()["kernel"] == "flex_attention"
    offloaded = [name for name, file in scene.files.given().items() if offloads(file)]
    if not flex and not offloaded:
        yield ok("nothing has to be compiled")
        return
    found = _compiler()
    what = "flex_attention" if flex else f"the offload of {', '.join(offloaded)}"
    if found:
        yield ok(f"{found}, for {what}")
    elif flex:
        yield fail(f"there is no C++ compiler, and {what} needs one", "apt-get install g++, or set CXX")
    else:
        yield warn(
            f"there is no C++ compiler, and DeepSpeed may want one for {what}", "apt-get install g++, or set CXX"
        )


def needed_by(plan: Plan) -> list[str]:
    """By name; those of the training stack always."""
    model, tracking = plan.config.model, plan.config.tracking
    trainings = [phase.settings.training for phase in plan.phases]
    asked = {
        "bitsandbytes": model.use_4bit
        or any("8bit" in each.optimizer or "4bit" in each.optimizer for each in trainings),
        ATTENTION.get(model.attention, ""): model.attention in ATTENTION,
        "liger-kernel": any(each.loss == "liger" for each in trainings),
        "wandb": tracking.wandb.enabled,
        "tensorboard": tracking.tensorboard.enabled,
        "datasets": any(source.split for phase in plan.phases for source in phase.phase.sources),
        "gigatoken": any(phase.settings.data.tokenizer_backend == "gigatoken" for phase in plan.phases),
    }
    return [*ALWAYS, *(name for name, needed in asked.items() if needed)]


def _package(name: str, allowed: Requirement | None, pin: str | None) -> Seen | None:
    """What is wrong with it, if anything is."""
    install = f'pip install "{name}{allowed.specifier if allowed else ""}"'
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name in NEVER_STOPS:
            return warn(f"{name} is not installed; training goes on without it", install)
        return fail(f"{name} is not installed", install)
    if allowed and not allowed.specifier.contains(found, prereleases=True):
        return fail(f"{name} {found} is installed, and {allowed.specifier} is needed", install)
    if pin and name in PACKAGES and Version(found).release[:2] > Version(pin).release[:2]:
        found = f"{name} {found} is newer than the {pin} that this release was tested with"
        return warn(found, f'pip install "{name}=={pin}", if something is odd')
    return None


def _ranges() -> dict[str, Requirement]:
    """What our own metadata asks for, extras and all."""
    requirements = map(Requirement, importlib.metadata.requires(OURS) or ())
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in requirements}


def _pins(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return {name.strip().lower().replace("_", "-"): pin.strip() for name, _, pin in pairs if pin}


def _may_be_flex(scene: Scene) -> bool:
    """Without a GPU it is only taken where it is asked for by name; torch is then not asked in vain."""
    asked = scene.plan.config.model.attention
    return asked == "flex_attention" or (asked == "auto" and bool(scene.gpus.given()))


def _compiler() -> str | None:
    named = os.environ.get("CXX", "").split()[:1]
    return next(filter(None, map(shutil.which, [*named, "c++", "g++", "clang++"])), None)
