"""How an answer is drawn, and what each setting may be."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from phased_cpt.config.allowed import nearest
from phased_cpt.errors import InputError


@dataclass(frozen=True)
class Settings:
    """The same seed, prompt and settings give the same answer."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 50
    max_tokens: int = 512
    repetition_penalty: float = 1.0  # another value hides that a model repeats itself
    seed: int = 42


@dataclass(frozen=True)
class Limit:
    """What a setting may be, and what that does."""

    kind: type[int] | type[float]
    low: float
    high: float
    does: str

    def __str__(self) -> str:
        return f"a {'whole ' if self.kind is int else ''}number from {self.low:g} to {self.high:,g}"


LIMITS = {
    "temperature": Limit(float, 0, 5, "0 takes the likeliest token each time; higher is freer"),
    "top_p": Limit(float, 0.01, 1, "draw from the likeliest tokens that have this share of the probability"),
    "top_k": Limit(int, 0, 999_999, "draw from that many of the likeliest tokens; 0 from all"),
    "max_tokens": Limit(int, 1, 999_999, "an answer is no longer than this"),
    "repetition_penalty": Limit(float, 0.1, 10, "above 1, what was said already becomes less likely"),
    "seed": Limit(int, 0, 999_999, "of what is drawn; the same seed, the same words"),
}


def changed(settings: Settings, name: str, given: str) -> Settings:
    """The settings with one of them changed, if it may be that."""
    if name not in LIMITS:
        raise InputError(f"there is no setting {name}{nearest(name, LIMITS)}; there are {', '.join(LIMITS)}")
    limit = LIMITS[name]
    try:
        value = limit.kind(given)
    except ValueError:
        raise InputError(f"{name}: {given} is no {'whole ' if limit.kind is int else ''}number; {limit}") from None
    if not limit.low <= value <= limit.high:  # nor is nan
        raise InputError(f"{name}: {given} is out of its range; {limit}")
    values: dict[str, Any] = {name: value}
    return replace(settings, **values)


def told(settings: Settings) -> str:
    """All of them, in one line."""
    return "  ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in asdict(settings).items()
    )
