"""How a written value becomes the value that is meant, where YAML 1.1, Python or pydantic would read it otherwise."""

import os
import re
from decimal import Decimal
from typing import Any

from pydantic_core import PydanticCustomError

UNITS = (
    {"": 1}
    | {
        f"{prefix}{suffix}": base**power
        for power, prefix in enumerate("KMGT", start=1)
        for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
    }
    | {"B": 1}
)
_SIZE = re.compile(r"^([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)$")


def not_a_boolean(given: Any) -> Any:
    """`true` is 1 in Python; in a configuration it is a mistake."""
    if isinstance(given, bool):
        raise ValueError("a number is needed")
    return given


def whole_number(given: Any) -> Any:
    """A float beyond 2**53 is whole by accident (1e300); nothing here counts that far."""
    if isinstance(given, float) and abs(given) > 2**53:
        raise ValueError("a smaller number is needed")
    return not_a_boolean(given)


def not_a_number(given: Any) -> Any:
    """1 is true in Python; the configuration says true, yes or on."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        raise ValueError("true or false is needed")
    return given


def parse_size(given: Any) -> Any:
    """2GB is 2,000,000,000 bytes and 2GiB is 2**31, as the hub's libraries count."""
    if not isinstance(given, str):
        return not_a_boolean(given)
    match = _SIZE.match(given.strip())
    if not match or match[2].upper() not in UNITS:
        raise ValueError("a size is needed")
    size = int(Decimal(match[1].replace("_", "")) * UNITS[match[2].upper()])
    if size >= 2**63:
        raise ValueError("a smaller size is needed")
    return size


def place(given: str) -> str:
    """~ is the home folder, as in a shell; $VARIABLES are refused: a run must not depend on whose shell it is."""
    if re.search(r"\$\{|\$[A-Za-z_]", given):
        raise PydanticCustomError("explained", "variables are not filled in; write it out, or use --set from a shell")
    return os.path.expanduser(given)  # noqa: PTH111 - a hub id is no path


def path_as_source(given: Any) -> Any:
    """A path alone is a source with nothing else to say."""
    return {"path": given} if isinstance(given, str) else given


def one_or_many(given: Any) -> Any:
    """A single path, or a single mapping, stands for a list of one."""
    return [given] if isinstance(given, str | dict) else given


# These change the base when they begin, and the adapter alone is only what came after.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def leaves_the_base_alone(given: Any) -> Any:
    """Ways to begin an adapter that PEFT knows, and that would not stand on the base that everything here is on."""
    name = given.lower() if isinstance(given, str) else ""
    if name.startswith(CHANGE_THE_BASE):
        what = "it moves a part of the base into the adapter, and the base stays as it is in every phase"
        raise PydanticCustomError("explained", "{what}; take default, gaussian or orthogonal", {"what": what})
    if name in ("eva", "mica"):
        what = "it needs the data before there is an adapter" if name == "eva" else "it trains one of two matrices only"
        raise PydanticCustomError("explained", "{what}; take default, gaussian or orthogonal", {"what": what})
    return given
