"""Small runs to be looked at: a tiny model, a few documents, and a machine whose nvidia-smi is ours."""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from phased_cpt.config import load
from phased_cpt.data.watch import Unwatched
from phased_cpt.doors import LaunchedJobs
from phased_cpt.launchers import machine
from phased_cpt.plan import make_plan
from phased_cpt.preflight import CHECKS, Scene
from phased_cpt.preflight.seen import Seen
from tests.conftest import TOKENIZER

SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LINES = "".join(json.dumps({"text": f"document {at}: " + "some words of it " * 30}) + "\n" for at in range(40))

Sections = dict[str, Any]


def written(**sections: Any) -> Path:
    """A run in the working folder; sections are merged over it."""
    content: Sections = {
        "run": {"name": "small"},
        "model": {"from_config": SHAPE, "tokenizer": str(TOKENIZER), "precision": "fp32"},
        "lora": {"r": 4, "alpha": 8, "target_modules": "auto"},
        "data": {"max_tokens": 64, "overlap_tokens": 8, "eval_share": 0.1},
        "training": {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "deepspeed": "zero2"},
        "launch": {"num_gpus": 2},
        "phases": [{"name": "one", "sources": "a.jsonl", "max_steps": 100}],
    }
    for name, section in sections.items():
        merged = isinstance(section, dict) and name in content
        content[name] = {**content[name], **section} if merged else section
    if not Path("a.jsonl").exists():
        Path("a.jsonl").write_text(LINES)
    Path("run.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return Path("run.json")


def seen_scene(**sections: Any) -> Scene:
    plan = make_plan(load(written(**sections)))
    return Scene(plan, Unwatched(), lambda: LaunchedJobs.of(plan))


def model_folder(shape: Sections) -> str:
    """A model by its name: a config.json, and weights of a sort."""
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(shape))
    save_file({"a": numpy.zeros((4, 4), "f4")}, "model/model.safetensors")
    return "model"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, and an environment that names nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_PORT", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "CUDA_VISIBLE_DEVICES", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


Gpus = Callable[..., None]


@pytest.fixture
def gpus(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """A machine with so many GPUs, of so many MiB each, of which so many are free; and who is at work on the first."""

    def has(count: int, total: int = 81920, free: int = 81000, at_work: str = "") -> None:
        rows = "".join(f"{at}, GPU-{at}, Some GPU, 580.1, {total}, {free}\n" for at in range(count))
        said = {"smi-rows": rows, "smi-totals": f"{total}\n" * count, "smi-work": at_work and f"GPU-0, {at_work}\n"}
        for name, text in said.items():
            (here / name).write_text(text)
        script = here / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        which = f"*compute-apps*) cat {here}/smi-work;; *uuid*) cat {here}/smi-rows;; *) cat {here}/smi-totals;;"
        script.write_text(f'#!/bin/sh\ncase "$*" in {which} esac\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        machine._gpus_of_the_machine.cache_clear()

    yield has
    machine._gpus_of_the_machine.cache_clear()


@contextlib.contextmanager
def server(code: int, body: Any = None, **headers: str) -> Iterator[str]:
    """A server on this machine that answers everything alike."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(json.dumps(body or {}).encode())

        do_POST = do_HEAD = do_GET  # noqa: N815 - what the server calls

        def log_message(self, *said: Any) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    """The control: what every check says of a run that nothing is wrong with."""
    from phased_cpt.preflight import seen_by

    with contextlib.chdir(tmp_path_factory.mktemp("good")):
        scene = seen_scene(model={"name": model_folder(SHAPE | {"eos_token_id": 0}), "from_config": None})
        return {name: list(seen_by(check, scene)) for name, check in CHECKS.items()}
