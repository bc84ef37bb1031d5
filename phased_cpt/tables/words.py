"""How figures and values are written, and how wide a screen is."""

from typing import Any

from rich.console import Console, RenderableType

PLAIN_WIDTH = 160  # of a log file or a pipe, where there is no terminal to ask


def shown(what: RenderableType, *, stderr: bool = False) -> str:
    """What a console would print, as wide as the terminal; a pipe gets a width that breaks no row.

    Users' texts may hold [brackets] and :colons:, so neither is a style or a picture here.
    """
    options: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    console = Console(**options)
    if not console.is_terminal:
        console = Console(**options, width=PLAIN_WIDTH)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def counted(amount: float, noun: str) -> str:
    """1 step, 2 steps."""
    figure = f"{amount:,.0f}" if amount == int(amount) else f"{amount:g}"
    return f"{figure} {noun}{'' if amount == 1 else 's'}"


def short(number: float) -> str:
    """1e-4 and not 0.0001, as people write learning rates."""
    if number == 0 or number >= 0.01:
        return f"{number:g}"
    mantissa, _, exponent = f"{number:.6e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def words(value: Any) -> str:
    """A value as it is written in YAML, cut where it is long."""
    if isinstance(value, float):
        return short(value)
    if isinstance(value, dict):
        pairs = ", ".join(f"{key}: {words(child)}" for key, child in value.items())
        return f"{{{pairs}}}" if len(pairs) <= 60 else f"{{{pairs[:57]}…}}"
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)
