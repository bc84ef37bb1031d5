"""Whether two nodes would do the same: the code that they run, and the configuration that they have read."""

import functools
import hashlib
import importlib.metadata
import platform
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import phased_cpt
from phased_cpt.plan import Plan
from phased_cpt.resolved import every_value

# What may move the last digits, or has other arguments in another release.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
OF_A_NODE = ("launch.", "run.output_dir", "run.dir", "run.cache_dir", "tracking.")  # node 0's hold; they may differ
SHOWN = 5  # differences


@dataclass(frozen=True)
class Identity:
    """Of a node, or a rank."""

    host: str
    code: dict[str, str]  # versions, and the digest of our own files
    settings: dict[str, Any]  # every value of the configuration that moves what is trained

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def identity_of(plan: Plan | None) -> Identity:
    """Of this process; of a plan where it has one."""
    values = every_value(plan) if plan else {}
    settings = {path: value for path, value in values.items() if not path.startswith(OF_A_NODE)}
    return Identity(socket.gethostname(), code(), settings)


def versions() -> dict[str, str]:
    """Of the libraries that train."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


@functools.cache
def code() -> dict[str, str]:
    """What is run here, to the byte."""
    return {"python": platform.python_version(), **versions(), "phased_cpt": _own_digest()}


def _own_digest() -> str:
    root = Path(phased_cpt.__file__).parent
    hashed = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        hashed.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:12]


def differences(mine: Identity, other: Identity) -> list[str]:
    """`learning_rate is 1e-4 on a, 5e-5 on b`, of code and settings; nothing where the two are alike."""
    pairs = [(mine.code, other.code)]
    if mine.settings and other.settings:
        pairs.append((mine.settings, other.settings))
    found = [
        f"{name} is {here.get(name)} on {mine.host}, {there.get(name)} on {other.host}"
        for here, there in pairs
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return found[:SHOWN] + more
