"""Loss over the steps of each phase, in panels of one scale.

           ┌ 8.0 ─╲───────┬──────────────┐  2,981 ┐
nats/token │ 6.0 ──╲──────┼─╲────────────│    403 │ perplexity: the same height, read on the right
           └ 4.0 ───╰─────┴──╰───────────┘     55 ┘
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from phased_cpt.report.folder import Facts, Folder, FoundPhase
from phased_cpt.report.logs import number
from phased_cpt.report.written import loss, perplexity, rate, whole
from phased_cpt.run_dir import in_bytes

WIDTH, LEFT, RIGHT = 320.0, 34.0, 50.0
TOP, HEIGHT, BOTTOM = 16.0, 190.0, 28.0  # of the panel of the loss; HEIGHT is what curves have
STRIP_TOP, STRIP_HEIGHT = 22.0, 30.0
MOST_POINTS = 240  # three a pixel pair: more is ink, not information
SMOOTHED_SHARE = 0.04  # of the steps, in the bold line
STRIPS: dict[str, tuple[str, Callable[[float], str]]] = {
    "learning_rate": ("learning rate", rate),
    "tokens_per_second": ("tokens a second", whole),
    "memory_bytes": ("memory", in_bytes),
}

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """Values to a height."""

    low: float
    high: float
    top: float
    height: float

    def y(self, value: float) -> float:
        part = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1.0)
        return self.top + self.height * (1 - part)


def curves(folder: Folder) -> Facts:
    """A panel a phase that has logged anything."""
    phases = [phase for phase in folder.phases if phase.train or phase.evaluations]
    if not phases:
        return {"panels": []}
    low, high = _range(phases)
    scale = Scale(low, high, TOP, HEIGHT)
    strips = {field: _strip_scale(phases, field) for field in STRIPS}
    return {
        "panels": [_panel(phase, scale, strips) for phase in phases],
        "width": WIDTH, "height": TOP + HEIGHT + BOTTOM, "strip_height": STRIP_TOP + STRIP_HEIGHT + 6, "left": LEFT,
        "right": WIDTH - RIGHT, "top": TOP, "bottom": TOP + HEIGHT,
    }  # fmt: skip


def _range(phases: Sequence[FoundPhase]) -> tuple[float, float]:
    """Held-out losses whole; of the training loss all but its rare spikes, which run out of the picture."""
    held_out = [y for phase in phases for _, y in series(phase.own_evaluations(), "eval_loss")]
    trained = sorted(y for phase in phases for _, y in series(phase.train, "loss"))
    seen = held_out + (trained[: max(1, math.ceil(0.995 * len(trained)))] if trained else [])
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def series(lines: Iterable[Facts], field: str) -> Points:
    pairs = ((float(line["step"]), number(line.get(field))) for line in lines)
    return [(step, value) for step, value in pairs if value is not None]


def _panel(phase: FoundPhase, scale: Scale, strips: dict[str, Scale | None]) -> Facts:
    last = max(phase.steps or 0, phase.step, *(float(line["step"]) for line in phase.evaluations), 1.0)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def drawn(points: Points, height: Scale) -> str:
        return " ".join(f"{x(step):.1f},{height.y(value):.1f}" for step, value in points)

    train, held_out = series(phase.train, "loss"), series(phase.own_evaluations(), "eval_loss")
    thin = thinned(train)
    return {
        "name": phase.name, "number": phase.number, "state": phase.state, "id": f"loss-{phase.number}",
        "band": drawn([(at, high) for at, _, _, high in thin] + [(at, low) for at, low, _, _ in thin[::-1]], scale),
        "line": drawn(smoothed([(at, mean) for at, _, mean, _ in thin]), scale),
        "held_out": drawn(held_out, scale),
        "dots": [(round(x(at), 1), round(scale.y(value), 1)) for at, value in _apart(held_out)],
        "others": [drawn(each, scale) for each in _other_sets(phase)],
        "published": _published(phase, x, scale),
        "ticks": [
            {"y": round(scale.y(tick), 1), "loss": f"{tick:g}", "perplexity": _as_perplexity(tick)}
            for tick in ticks(scale.low, scale.high)
        ],
        "steps": [{"x": round(x(at), 1), "text": whole(at)} for at in (0, last)],
        "strips": [strip for field in STRIPS if (strip := _strip(phase, field, strips[field], x))],
        "spoken": _spoken(phase, train, held_out),
    }  # fmt: skip


def thinned(points: Points) -> list[tuple[float, float, float, float]]:
    """(step, lowest, mean, highest) of each of at most MOST_POINTS neighbourhoods of as many points."""
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    found = []
    for begin in range(0, len(points), size):
        values = [value for _, value in points[begin : begin + size]]
        at = sum(step for step, _ in points[begin : begin + size]) / len(values)
        found.append((at, min(values), sum(values) / len(values), max(values)))
    return found


def smoothed(points: Points) -> Points:
    """A running mean, centred; it narrows towards the ends, where it would lag."""
    reach = round(len(points) * SMOOTHED_SHARE / 2)
    found = []
    for at, (step, _) in enumerate(points):
        side = min(reach, at, len(points) - 1 - at)
        near = [value for _, value in points[at - side : at + side + 1]]
        found.append((step, sum(near) / len(near)))
    return found


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values between two others."""
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(size * magnitude for size in (1, 2, 2.5, 5, 10) if size * magnitude >= rough * 0.999)
    return [round(at * step, 10) for at in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _as_perplexity(value: float) -> str:
    found = math.exp(min(value, 700))
    return whole(found) if 10 <= found < 1e6 else perplexity(found)


def _apart(points: Points) -> Points:
    """Every point, as long as each can be seen as one."""
    return points if len(points) <= 40 else []


def _other_sets(phase: FoundPhase) -> list[Points]:
    names = dict.fromkeys(line.get("dataset", phase.name) for line in phase.evaluations)
    others = [
        [line for line in phase.evaluations if line.get("dataset") == name] for name in names if name != phase.name
    ]
    return [series(lines, "eval_loss") for lines in others]


def _published(phase: FoundPhase, x: Callable[[float], float], scale: Scale) -> Facts | None:
    """The point that was handed on, with its numbers."""
    step, value = number(phase.source.get("step")), number(phase.end.get("eval_loss"))
    if step is None or value is None:
        return None
    at, height = x(step), scale.y(value)
    above = height > TOP + 34  # else it would run into the name of the axis
    return {
        "x": round(at, 1), "y": round(height, 1), "text_y": round(height - 10 if above else height + 20, 1),
        "text_x": round(min(at + 4, WIDTH - RIGHT), 1), "loss": loss(value),
    }  # fmt: skip


def _strip_scale(phases: Sequence[FoundPhase], field: str) -> Scale | None:
    values = [value for phase in phases for _, value in series(phase.train, field)]
    return Scale(0.0, max(values), STRIP_TOP, STRIP_HEIGHT) if values and max(values) > 0 else None


def _strip(phase: FoundPhase, field: str, scale: Scale | None, x: Callable[[float], float]) -> Facts | None:
    points = series(phase.train, field)
    if scale is None or not points:
        return None
    name, written = STRIPS[field]
    mean = sum(value for _, value in points) / len(points)
    most = max(value for _, value in points)
    told = f"mean {written(mean)}" if field == "tokens_per_second" else f"most {written(most)}"
    line = " ".join(f"{x(at):.1f},{scale.y(value):.1f}" for at, _, value, _ in thinned(points))
    return {"name": name, "told": told, "line": line, "base": scale.y(0.0)}


def _spoken(phase: FoundPhase, train: Points, held_out: Points) -> str:
    """The panel for who cannot see it."""
    said = [f"Phase {phase.number}, {phase.name}."]
    if train:
        said.append(f"Training loss from {loss(train[0][1])} to {loss(train[-1][1])} in {whole(phase.step)} steps.")
    if held_out:
        said.append(f"Held-out loss from {loss(held_out[0][1])} to {loss(held_out[-1][1])}.")
    return " ".join(said)
