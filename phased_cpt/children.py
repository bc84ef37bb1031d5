"""How a child process finds this program: where its parent found it, and not in the folder that one is called from.

`python -m` looks there first, so a queue.py of the user's, or an older checkout, would be taken for the real one.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parents[1]


def command(module: str) -> list[str]:
    """Of a module of ours."""
    return [sys.executable, *(["-P"] if _is_elsewhere() else []), "-m", module]


def safe_path() -> dict[str, str]:
    """The same as an environment, for whatever launchers start."""
    return {"PYTHONSAFEPATH": "1"} if _is_elsewhere() else {}


def _is_elsewhere() -> bool:
    return Path.cwd() != HERE  # else it is this checkout that is meant, installed or not
