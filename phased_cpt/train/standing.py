"""How far a phase has come: all that is not a tensor, as JSON and back.

Random numbers have no state here: they are drawn anew for each row of each step. Nor has the learning rate, which is a
function of the steps, and of where a phase that stops early began to cool down; the place in the data is their number.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from phased_cpt.evals.heldout import Measured
from phased_cpt.schedule import Cooling


@dataclass
class Best:
    """The best weights so far, by their held-out loss."""

    step: int
    loss: float
    worse_since: int = 0  # evaluations


@dataclass
class Standing:
    """A phase under way."""

    step: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    best: Best | None = None
    measured: dict[int, dict[str, Measured]] = field(default_factory=dict)
    skipped_steps: int = 0  # of fp16
    skipped_in_a_row: int = 0
    first_bits: dict[str, int] = field(default_factory=dict)  # of the weights that the phase began with
    stopped_early: bool = False
    cooling: Cooling | None = None  # out of patience, on its way down
    row_before_seconds: float = 0.0  # of the evaluation before step 0, where it is row 0 of the matrix

    def text(self) -> str:
        return json.dumps(asdict(self) | {"measured": _told(self.measured)}, allow_nan=False, indent=1)

    @classmethod
    def parse(cls, text: str) -> "Standing":
        values = json.loads(text)
        best, cooling = values["best"], values.get("cooling")
        read = {"best": best and Best(**best), "cooling": cooling and Cooling(**cooling)}
        return cls(**values | read | {"measured": _read(values["measured"])})


def _told(measured: dict[int, dict[str, Measured]]) -> dict[str, dict[str, list[Any]]]:
    """A loss that is no number is null."""
    return {
        str(step): {name: [each.loss if math.isfinite(each.loss) else None, each.tokens] for name, each in sets.items()}
        for step, sets in measured.items()
    }


def _read(measured: dict[str, dict[str, list[Any]]]) -> dict[int, dict[str, Measured]]:
    return {
        int(step): {name: Measured(math.nan if loss is None else loss, tokens) for name, (loss, tokens) in sets.items()}
        for step, sets in measured.items()
    }
