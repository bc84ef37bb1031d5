"""The files that come with the package: configs/ and deepspeed_configs/."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(kind: str) -> Path:
    """In an installed wheel the folder lies in the package; in a checkout it stands beside it."""
    inside = _PACKAGE / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def shipped_names(kind: str) -> list[str]:
    """The names by which shipped files can be called: zero2, zero3, …"""
    return sorted(path.stem for path in shipped_folder(kind).glob("*") if path.suffix in (".json", ".yaml"))
