"""Run folders made by hand: the few files that a report reads, and nothing else."""

import json
from pathlib import Path
from typing import Any

from phased_cpt.run_dir import RunDir

ROW = {"foundation": 3.2, "evolution": 4.0, "wiki": 5.0}
FORGETTING = {
    "format": 1,
    "run": "tales",
    "sets": [
        {"name": "foundation", "kind": "phase", "tokens": 100, "bytes": 400},
        {"name": "evolution", "kind": "phase", "tokens": 50, "bytes": 200},
        {"name": "wiki", "kind": "general", "tokens": 70, "bytes": 300},
    ],
    "rows": [
        {"after": None, "seconds": 1.0, "losses": ROW, "bits_per_byte": {"foundation": 1.1}},
        {"after": "foundation", "seconds": 1.0, "losses": {"foundation": 2.9, "evolution": 3.9, "wiki": None}},
        {"after": "evolution", "seconds": 1.0, "losses": {"foundation": 3.0, "evolution": 3.1, "wiki": 5.2}},
    ],
    "measures": {
        "sets": {
            "foundation": {
                "base": 3.2, "best": 2.9, "best_after": "foundation", "final": 3.0, "backward_transfer": -0.1,
                "forward_transfer": None, "forgetting": 0.1,
            },
            "evolution": {"base": 4.0, "best": 3.1, "best_after": "evolution", "final": 3.1, "forward_transfer": 0.1},
            "wiki": {"base": 5.0, "best": 5.0, "best_after": None, "final": 5.2, "drift": 0.2},
        },
        "mean": {
            "final": 3.05, "backward_transfer": -0.1, "forward_transfer": 0.1, "forgetting": 0.1, "general_drift": 0.2,
        },
    },
    "controls": {"evolution": {"losses": {"foundation": 2.85}, "forgetting": {"foundation": 0.15}}},
    "cost": {"seconds": 12.3, "share": 0.04},
}  # fmt: skip
SAMPLES = {
    "prompts": [{"set": "foundation", "text": "def add(a,", "continues": " b):"}],
    "before": [" zq zq"],
    "after": [" b) -> int:"],
}
ACCOUNT = {
    "documents": 85, "blocks": 4, "tokens_source": 900, "tokens_trained": 800, "tokens_first": 85, "tokens_masked": 15,
    "tokens_context": 60, "tokens_repeated": 0, "tokens_padded": 40, "tokens_dropped": 0, "efficiency": 0.96,
}  # fmt: skip
DATA = {"name": "foundation", "steps": 4, "splits": {"train": ACCOUNT, "eval": {"documents": 3}}}


def step(at: int, loss: float | None, second: int, **more: Any) -> dict[str, Any]:
    return {
        "ts": f"2026-01-02T03:{second // 60:02}:{second % 60:02}.000+00:00", "step": at, "loss": loss, "epoch": 0.1,
        "learning_rate": 1e-3, "tokens_seen": 100 * at, "tokens_per_second": 50.0, "eta_seconds": 10.0,
        "curriculum_eta_seconds": 30.0, **more,
    }  # fmt: skip


def evaluation(at: int, loss: float, dataset: str = "foundation") -> dict[str, Any]:
    return {"ts": "2026-01-02T03:04:00+00:00", "step": at, "dataset": dataset, "eval_loss": loss, "tokens": 100}


def phase(number: int, name: str, state: str = "done", **more: Any) -> dict[str, Any]:
    return {
        "name": name, "folder": f"phase{number}_{name}", "state": state, "started": "2026-01-02T03:04:00+00:00",
        "finished": "2026-01-02T03:05:00+00:00" if state == "done" else None, **more,
    }  # fmt: skip


def record(*phases: dict[str, Any], **more: Any) -> dict[str, Any]:
    attempt = {"started": "2026-01-02T03:03:50+00:00", "host": "here", "pid": 1, "version": "1.0"}
    return {
        "name": "tales", "created": "2026-01-02T03:03:50+00:00", "values": {"model.name": "some/model"},
        "config": {"phases": [{"name": each["name"], "max_steps": 4} for each in phases]},
        "phases": phases, "attempts": [attempt], **more,
    }  # fmt: skip


def folder(root: Path, files: dict[str, Any]) -> RunDir:
    """Files by their paths: bytes and texts as they are, a list as JSON lines, anything else as JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(each) + "\n" for each in content))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return RunDir(root)


def two_phases(root: Path, **more: Any) -> RunDir:
    """A finished run with one of everything; `more` are files that stand in place of these."""
    digest = "ab" * 32
    adapter = {"kind": "adapter", "base": "cd" * 32, "adapters": [{"digest": digest, "folder": "phase1_foundation/a"}]}
    source = {
        "step": 4, "steps": 4, "why": "lowest held-out loss", "tokens": 400, "seconds": 8.0,
        "start": {"eval_loss": 3.2, "perplexity": 24.5, "tokens": 100},
        "end": {"eval_loss": 2.9, "perplexity": 18.2, "tokens": 100},
    }  # fmt: skip
    gate = {"max_forgetting": 0.05, "forgetting": 0.1, "worst": "foundation", "passed": False, "on_fail": "warn"}
    files = {
        "run.json": record(
            phase(1, "foundation", published=adapter, started_from={"kind": "base", "base": "cd" * 32}),
            phase(2, "evolution", started_from=adapter, gate=gate),
        ),
        "config_resolved.yaml": "# Every value\nrun:\n  seed: 7    # run.yaml:3\n  name: tales  # default\n",
        "forgetting.json": FORGETTING,
        "phase1_foundation/best_adapter/source.json": source,
        "phase1_foundation/data.json": DATA,
        "phase1_foundation/samples.json": SAMPLES,
        "phase1_foundation/logs/train.jsonl": [step(at, 4.0 - 0.2 * at, 240 + at) for at in range(1, 5)],
        "phase1_foundation/logs/eval.jsonl": [evaluation(0, 3.2), evaluation(4, 2.9)],
        "phase2_evolution/best_adapter/source.json": source,
        "phase2_evolution/logs/train.jsonl": [step(at, 3.0, 270 + at) for at in range(1, 5)],
    }
    return folder(root, files | more)
