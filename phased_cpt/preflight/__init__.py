"""What could fail, found before it does: one function a check.

plan ─ scene ─┬─ check ─→ ok | warn | fail | skip, what was found, what to type
              └─ …        one that stands on what is missing is skipped: another says why
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from phased_cpt.errors import Interrupted, PhasedCptError
from phased_cpt.preflight import data, machine, model, network, packages, places, plan, tracking
from phased_cpt.preflight.facts import fit_facts
from phased_cpt.preflight.scene import Scene, Skipped
from phased_cpt.preflight.seen import AGAIN, RISING, Check, Seen, Verdict, fail, skip, told

__all__ = ["CHECKS", "Finding", "Scene", "answer", "looked"]

# Quick ones first: who stops it early has seen most of it.
CHECKS: dict[str, Check] = {
    "configuration": plan.configuration,
    "batch": plan.batch,
    "run folder": places.run_folder,
    "ledger": places.ledger,
    "write access": places.write_access,
    "clock": places.clock,
    "limits": machine.limits,
    "shared memory": machine.shared_memory,
    "port": network.port,
    "packages": packages.packages,
    "GPUs": machine.gpus,
    "GPU memory": machine.gpu_memory,
    "W&B": tracking.wandb,
    "sources": data.sources,
    "tokenizer": model.tokenizer,
    "base": model.base,
    "vocabulary": model.vocabulary,
    "positions": model.positions,
    "heads": model.heads,
    "DeepSpeed file": plan.deepspeed,
    "4 bits": plan.four_bits,
    "memory": machine.memory,
    "host memory": machine.host_memory,
    "merge memory": machine.merge_memory,
    "data": data.data,
    "rows": data.rows,
    "disk": places.disk,
    "torch": machine.torch,
    "optimizer": machine.optimizer,
    "adapter targets": model.adapter_targets,
    "attention": machine.attention,
    "compiler": packages.compiler,
    "collective": network.collective,
}


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    name: str
    verdict: Verdict
    found: str
    fix: str


def looked(scene: Scene) -> list[Finding]:
    """What every check has found."""
    return [
        Finding(name, seen.verdict, seen.found, seen.fix)
        for name, check in CHECKS.items()
        for seen in seen_by(check, scene)
    ]


def seen_by(check: Check, scene: Scene) -> Iterator[Seen]:
    """One check; however it ends, the others are not brought down."""
    try:
        yield from check(scene)
    except Interrupted:
        raise KeyboardInterrupt from None  # it is nothing that a later call would go on with
    except Skipped as missing:
        yield skip(str(missing))
    except PhasedCptError as error:
        yield told(str(error))
    except Exception as error:  # of a library, or ours: told like any other
        yield fail(" ".join(f"{type(error).__name__}: {error}".split()), AGAIN)


def answer(findings: list[Finding], scene: Scene) -> dict[str, Any]:
    """All of it for a program: the checks, the worst verdict, and what the run will need."""
    worst = max((finding.verdict for finding in findings), key=RISING.index)
    verdict = "ok" if worst == "skip" else worst
    return {"checks": [asdict(finding) for finding in findings], "verdict": verdict, "fit": fit_facts(scene)}
