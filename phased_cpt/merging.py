"""A merge, from outside: what it is made of, whether it is there already, and the child process that makes it.

base + adapters ─ python -m phased_cpt.merge ─ .merged_model.building/ ─ checked ─ merge.json, last ─ merged_model/
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phased_cpt.errors import Diverged, InputError, Interrupted, PhasedCptError
from phased_cpt.launchers import CONDUCTOR
from phased_cpt.ledger.fingerprint import digest_of

MARKER = "merge.json"
FORMAT = 1
RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class FourBitBase:
    """How training has kept the base."""

    precision: str
    storage: str


@dataclass(frozen=True)
class Layer:
    """An adapter on the base, or on the adapters before it."""

    folder: str
    digest: str
    scale: float = 1.0


@dataclass(frozen=True)
class MergeJob:
    """All that the child is told."""

    base: str
    base_digest: str
    adapters: tuple[Layer, ...]
    output: str
    dtype: str  # auto: as the base is kept
    max_shard_size: int
    four_bits: FourBitBase | None = None
    base_kind: str = "auto"  # of a base in 4 bits: bf16, dequantized, or the better of both
    tokenizer: str | None = None  # a folder
    held_out: str | None = None  # a block index
    trust_remote_code: bool = False
    lineage: dict[str, Any] = field(default_factory=dict)  # for the model card alone

    @property
    def digest(self) -> str:
        """Of what the merged model is; where it lies, and what is told of it, is not in it."""
        layers = [[each.digest, each.scale] for each in self.adapters]
        four_bits = asdict(self.four_bits) if self.four_bits else None
        parts = [FORMAT, self.base_digest, layers, self.dtype, self.max_shard_size, four_bits]
        return digest_of([*parts, self.base_kind if four_bits else None])

    @classmethod
    def parse(cls, text: str) -> "MergeJob":
        values = json.loads(text)
        four_bits = values["four_bits"] and FourBitBase(**values["four_bits"])
        layers = tuple(Layer(**each) for each in values["adapters"])
        return cls(**values | {"adapters": layers, "four_bits": four_bits})


@dataclass(frozen=True)
class Merged:
    """What was made, or was there."""

    folder: Path
    facts: dict[str, Any]
    now: bool


def merge(job: MergeJob, *, force: bool = False) -> Merged:
    """The merged model of a job: made by a child process, unless it is there."""
    output = Path(job.output)
    facts = None if force else read_marker(output)
    if facts is not None and facts["digest"] == job.digest and _is_whole(output, facts):
        return Merged(output, facts, now=False)
    require_own(output)
    _run(job)
    facts = read_marker(output)
    if facts is None or facts["digest"] != job.digest:
        raise PhasedCptError(f"{output}: the merge has ended without publishing")
    return Merged(output, facts, now=True)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What a merged model says of itself; None where there is none."""
    try:
        facts = json.loads((folder / MARKER).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        facts = None
    return facts if isinstance(facts, dict) and isinstance(facts.get("files"), dict) and "digest" in facts else {
        "digest": "", "files": {}
    }  # fmt: skip


def require_own(output: Path) -> None:
    """Nothing is written over that a merge has not written."""
    if output.is_dir() and any(output.iterdir()) and read_marker(output) is None:
        raise InputError(f"{output}: holds something that is no merged model; name another folder, or empty it")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: this is a file, and a merged model is a folder; name another")


def _is_whole(folder: Path, facts: dict[str, Any]) -> bool:
    try:
        return all((folder / name).stat().st_size == each["bytes"] for name, each in facts["files"].items())
    except (OSError, KeyError, TypeError):
        return False


def _run(job: MergeJob) -> None:
    """Its progress goes where ours does; what it has to say at the end comes through a pipe."""
    child = subprocess.Popen(
        [sys.executable, "-m", "phased_cpt.merge"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=_environment(), start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = child.communicate(json.dumps(asdict(job)).encode())
    finally:
        if child.poll() is None:  # stopped, or failed here
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    _judge(child.returncode, said)


def _environment() -> dict[str, str]:
    """No rank of anything, with every core; and whatever DeepSpeed has set is not its business."""
    left = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_NAMES and not name.startswith(("DS_", "DEEPSPEED_", "OMP_"))
    }
    return left | {"TOKENIZERS_PARALLELISM": "false", CONDUCTOR: str(os.getpid())}


def _judge(code: int, said: bytes) -> None:
    try:
        word = json.loads(said.decode().strip().splitlines()[-1])
    except (ValueError, IndexError):
        word = {}
    if code == 0 and word.get("done"):
        return
    if "message" in word:
        errors: dict[int, type[PhasedCptError]] = {2: InputError, 5: Diverged, 75: Interrupted}
        raise errors.get(word["exit_code"], PhasedCptError)(word["message"])
    if code == -signal.SIGKILL:
        raise PhasedCptError("the merge was killed (out of memory, it may be); the same command goes on with it")
    raise PhasedCptError(f"the merge has failed (exit {code}); the same command goes on with it")
