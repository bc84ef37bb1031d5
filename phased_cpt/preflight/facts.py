"""What the run will need of the machine, for a program and for a table."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from phased_cpt import deepspeed_file
from phased_cpt.preflight.scene import Ground, Scene

Made = TypeVar("Made")


def fit_facts(scene: Scene) -> dict[str, Any]:
    """Hardware, phases, disk and time; what could not be found is null."""
    return {
        "hardware": _of(scene.hardware, asdict),
        "gpus": _of(scene.gpus, lambda gpus: [gpu.name for gpu in gpus]),
        "phases": _of(scene.fits, lambda fits: [_phase(scene, asdict(each)) for each in fits]),
        "disk": _of(scene.disk, lambda needs: [asdict(need) | {"place": str(need.place)} for need in needs]),
        "time": _of(scene.times, lambda times: [_time(asdict(each)) for each in times]),
    }


def _of(ground: Ground[Made], told: Callable[[Made], Any]) -> Any:
    return None if ground.missing else told(ground.given())


def _phase(scene: Scene, facts: dict[str, Any]) -> dict[str, Any]:
    return facts | {"zero_stage": deepspeed_file.stage_of(scene.files.given()[facts["phase"]])}


def _time(facts: dict[str, Any]) -> dict[str, Any]:
    return {"phase": facts["phase"], "seconds": facts["seconds"], "from": facts["from_"]}
