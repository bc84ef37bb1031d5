"""What /proc says of other processes; of one that is gone it says nothing."""

import os
from pathlib import Path

GONE = ""


def everyone() -> list[int]:
    """The processes of this machine, or of this container."""
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal()]


def state_of(process: int) -> str:
    """The letter that ps shows. One that has ended and waits to be buried is gone."""
    state = _stat(process)[0]
    return GONE if state in "ZX" else state


def parent_of(process: int) -> int:
    return int(_stat(process)[1])


def session_of(process: int) -> int:
    return int(_stat(process)[3])


def words_of(process: int) -> list[str]:
    """What it was called with."""
    return [os.fsdecode(word) for word in _read(process, "cmdline").split(b"\0")[:-1]]


def environment_of(process: int) -> dict[str, str]:
    """What it was started with."""
    pairs = (os.fsdecode(pair).partition("=") for pair in _read(process, "environ").split(b"\0") if pair)
    return {name: value for name, _, value in pairs}


def hears(process: int, number: int) -> bool:
    """Whether it has a handler for this signal: one without is ended by it."""
    lines = _read(process, "status").decode().splitlines()
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (number - 1) & 1)


def is_below(process: int, other: int) -> bool:
    """Whether it is the other, or was started by it, or by one that was."""
    while process > 1 and process != other:
        process = parent_of(process)
    return process == other


def tell(process: int, number: int) -> None:
    """A signal, for one that may have ended just now."""
    try:
        os.kill(process, number)
    except (ProcessLookupError, PermissionError):
        return


def _stat(process: int) -> list[str]:
    """From the state on; the name before it may hold anything, blanks and brackets too."""
    text = _read(process, "stat").decode(errors="replace")
    return text.rpartition(")")[2].split() or [GONE, "0", "0", "0"]


def _read(process: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{what}").read_bytes()
    except OSError:  # gone, or somebody else's
        return b""
