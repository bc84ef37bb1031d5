"""What torch and transformers say, asked in a child process: `python -m phased_cpt.probe`."""

import json
import os
import subprocess
from typing import Any

from phased_cpt import children
from phased_cpt.bases import Base
from phased_cpt.errors import PhasedCptError
from phased_cpt.launchers import Place, shared
from phased_cpt.plan import Plan

PATIENCE_SECONDS = 300.0  # the imports of a cold disk take a minute


def asked(plan: Plan, base: Base | None) -> dict[str, Any]:
    """The probe's answer: torch, its devices, the linear layers of the base, and the attention that can be used."""
    model = plan.config.model
    question = {
        "model": (base.shape or base.folder) if base else None,
        "trust_remote_code": model.trust_remote_code,
        "attention": model.attention,
        "precision": model.precision,
        "max_tokens": max(phase.settings.data.max_tokens for phase in plan.phases),
    }
    try:
        child = subprocess.run(  # noqa: S603
            children.command("phased_cpt.probe"), input=json.dumps(question), capture_output=True, text=True,
            env={**os.environ, **shared(Place.alone(1))}, timeout=PATIENCE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        what = f"torch and transformers are not loaded after {PATIENCE_SECONDS:.0f} s"
        raise PhasedCptError(f"{what}; a slow disk, or a sick GPU: `nvidia-smi` must answer") from None
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"it ended with exit code {child.returncode}"])[-1]
        raise PhasedCptError(f"torch and transformers cannot be loaded: {reason}; install them anew: pip install -e .")
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer
