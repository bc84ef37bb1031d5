"""The phase, the steps and the evaluations that these tests write, and a process that writes them until it is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phased_cpt.tracking import Line, Stretch, WandbSettings

WANDB = WandbSettings(project="tests", entity=None, mode="auto", id="run1id")


def stretch(root: Path, **changes: Any) -> Stretch:
    """The second of three phases: forty steps after a hundred."""
    known: dict[str, Any] = {
        "root": root,
        "run": "tales",
        "folder": "phase2_evolution",
        "phase": "evolution",
        "number": 2,
        "of": 3,
        "steps": 40,
        "steps_before": 100,
        "begin": 0,
        "attempt": 1,
        "tensorboard": False,
        "wandb": None,
    }
    return Stretch(**known | changes)


def step(number: int, **changes: Any) -> Line:
    return {
        "ts": "2026-11-20T09:05:07Z",
        "phase": "evolution",
        "step": number,
        "loss": 3.2141,
        "grad_norm": 0.5,
        "learning_rate": 9.1e-05,
        "epoch": 0.3,
        "progress_pct": 30.0,
        "eta_seconds": 80.2,
        "curriculum_eta_seconds": 302.0,
        "tokens_seen": 98304,
        "tokens_per_second": 1234.4,
    } | changes


def evaluation(number: int, **changes: Any) -> Line:
    return {
        "ts": "2026-11-20T09:05:07Z",
        "phase": "evolution",
        "step": number,
        "dataset": "evolution",
        "eval_loss": 3.412,
        "perplexity": 30.3256,
        "tokens": 12345,
    } | changes


def until(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not (answer := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return answer


def environment(**more: str) -> dict[str, str]:
    """Without what the caller has set for Weights & Biases, and with no key of theirs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return kept | {"NETRC": "/nowhere", "TERM": "xterm"} | more


@contextlib.contextmanager
def child(program: str, *arguments: object, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own, with these shapes at hand, that does not outlive the test."""
    text = f"import sys\nfrom pathlib import Path\nfrom tests.tracking.shapes import *\n{program}"
    here = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", text, *map(str, arguments)]
    with subprocess.Popen(command, cwd=here, **{"env": environment()} | more) as process:
        try:
            yield process
        finally:
            process.kill()


def killed(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed in the midst of its work"
