"""How the report writes figures; what is not known is a dash, whatever a file has in its place."""

from datetime import UTC, datetime, timedelta
from typing import Any

from phased_cpt.report.logs import moment, number
from phased_cpt.tables.words import short

DASH = "–"
MINUS = "−"  # as wide as a plus, unlike the hyphen
STEPS_OF_TIME = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def loss(value: Any) -> str:
    found = number(value)
    return DASH if found is None else f"{found:.3f}".replace("-", MINUS)


def change(value: Any) -> str:
    """+0.104, −0.320, and ±0.000."""
    found = number(value)
    if found is None:
        return DASH
    return "±0.000" if abs(found) < 0.0005 else f"{found:+.3f}".replace("-", MINUS)


def perplexity(value: Any) -> str:
    found = number(value)
    if found is None:
        return DASH
    return f"{found:,.1f}" if found < 1000 else f"{found:,.0f}" if found < 1e6 else short(found)


def whole(value: Any) -> str:
    found = number(value)
    return DASH if found is None else f"{found:,.0f}"


def share(value: Any, digits: int = 1) -> str:
    found = number(value)
    return DASH if found is None else f"{found:.{digits}%}"


def rate(value: Any) -> str:
    """1e-4, and of what a schedule computes as much as can be read."""
    found = number(value)
    return DASH if found is None else short(float(f"{found:.3g}"))


def lasted(value: Any) -> str:
    """3 min 20 s: the two largest units."""
    seconds = number(value)
    if seconds is None or seconds < 0:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    left, parts = round(seconds), list[str]()
    for size, unit in STEPS_OF_TIME:
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return " ".join(filter(None, parts[:2]))


def clock(value: Any) -> str:
    """21 Nov 2026, 04:48 UTC."""
    at = number(value) if not isinstance(value, str) else moment(value)
    return DASH if at is None else f"{datetime.fromtimestamp(at, UTC):%-d %b %Y, %H:%M} UTC"


def clock_left(seconds: float) -> str:
    """1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def brief_clock(at: float) -> str:
    """21 Nov, 04:48."""
    return f"{datetime.fromtimestamp(at, UTC):%-d %b, %H:%M}"


def digest(value: Any) -> str:
    """Enough of it to tell two apart."""
    return value[:12] if isinstance(value, str) and value else DASH
