"""The files that come with the package: configs/ and deepspeed_configs/."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(kind: str) -> Path:
    """In an installed wheel the folder lies in the package; in a checkout it stands beside it."""
    inside = _PACKAGE / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def shipped_names(kind: str) -> list[str]:
    """The names by which shipped files can be called: demo, kat-dev-32b, …; zero2, zero3, …"""
    ending = {"configs": ".yaml", "deepspeed_configs": ".json"}[kind]
    return sorted(path.stem for path in shipped_folder(kind).glob(f"*{ending}"))
