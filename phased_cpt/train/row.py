"""The weights that a phase is about to publish, measured: a row of the forgetting matrix, and what they say.

best weights, as they will lie on disk ─ into the model ─ every held-out set ─ as good as when they were saved? ─ gate
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from phased_cpt.data.index import open_blocks
from phased_cpt.errors import GateClosed, PhasedCptError
from phased_cpt.evals import Measured
from phased_cpt.evals.rows import Rows
from phased_cpt.evals.samples import Prompt, prompts_of, said
from phased_cpt.forgetting import Verdict, judged
from phased_cpt.job import SMOKE_EVAL_ROWS, Job
from phased_cpt.plan import PhasePlan
from phased_cpt.run_dir import GATE, publish_file

SAMPLES = "samples.json"
SAME = 1e-3  # of a loss: what another order of sums on a GPU may do; other weights do more


@dataclass
class PublishedRow:
    """What is measured of a phase's weights besides its own held-out documents as it goes."""

    job: Job
    phase: PhasePlan
    writes: bool
    device: torch.device
    tell: Callable[[str], None]
    beat: Callable[[], None]
    losses: dict[str, Measured] = field(default_factory=dict)
    seconds: float = 0.0
    verdict: Verdict | None = None

    def __post_init__(self) -> None:
        blocks = {name: open_blocks(Path(folder)) for name, (folder, _) in self.job.measure.sets.items()}
        if self.job.smoke:
            blocks = {name: each.first_rows(SMOKE_EVAL_ROWS) for name, each in blocks.items()}
        self.sets = {name: (Rows(each), self.job.measure.sets[name][1]) for name, each in blocks.items()}
        self.prompts: list[Prompt] = prompts_of(blocks, self.job.measure.prompts)

    @property
    def lengths(self) -> list[int]:
        """Of the rows of each set."""
        return [rows.blocks.shape.max_tokens for rows, _ in self.sets.values()]

    def measure(self, on_sets: Callable[[Mapping[str, tuple[Rows, int]]], dict[str, Measured]]) -> None:
        """Every set, on the weights that the model computes with now."""
        began = time.monotonic()
        self.losses = on_sets(self.sets)
        self.seconds = time.monotonic() - began
        told = ", ".join(f"{name} {each.loss:.4f}" for name, each in self.losses.items())
        self.tell(f"held out, after it: {told} ({self.seconds:.1f} s)")

    def require_as_measured(self, best: float | None) -> None:
        """What will be published loses on its own documents what it lost when it was found to be the best."""
        now = self.losses.get(self.phase.name)
        if best is None or now is None or abs(now.loss - best) <= SAME * abs(best):
            return
        what = f"the best weights lost {best:.6f} on their held-out documents, and as they are saved they lose"
        raise PhasedCptError(f"{what} {now.loss:.6f}; they are not published (evaluation.matrix: off publishes unseen)")

    def judge(self, before: Measured | None, own: Measured | None) -> None:
        """Whether the gate of the phase lets these weights pass. Every rank comes to the same end."""
        gate = self.phase.phase.gate
        if gate is None or self.job.smoke:  # which teaches nothing
            return
        found = {name: _number(each) for name, each in self.losses.items()}
        so_far = self.job.measure.best_so_far
        gained = _number(before), found.get(self.phase.name, _number(own))
        self.verdict = judged(gate.max_forgetting, gate.min_gain, so_far, found, gained)
        facts = asdict(self.verdict) | {"on_fail": gate.on_fail}
        if self.writes:
            folder = self.job.run.root / self.phase.folder
            publish_file(folder / GATE, (json.dumps(facts, indent=1) + "\n").encode())
        if self.verdict.passed:
            self.tell(f"gate passed: {self.verdict}")
        elif gate.on_fail == "warn":
            self.tell(f"careful: the gate would not let it pass, and it is published all the same: {self.verdict}")
        else:
            mend = "train it otherwise (`--redo-from` it), or let it pass with gate.on_fail: warn"
            raise GateClosed(f"phase {self.phase.name} is trained and not published: {self.verdict}; {mend}")

    def say(self, model: nn.Module, key: str) -> None:
        """How the model goes on with the prompts, into the file of the phase; "before" is the base."""
        if not self.prompts:
            return
        began = time.monotonic()
        texts = said(model, self.prompts, self.device, self.beat)
        if self.writes:
            decode = Tokenizer.from_file(str(self.job.run.root / "tokenizer" / "tokenizer.json")).decode
            path = self.job.run.root / self.phase.folder / SAMPLES
            prompts = [
                {"set": each.set, "text": decode(list(each.ids)), "continues": decode(list(each.continues))}
                for each in self.prompts
            ]
            facts = {"prompts": prompts, "before": None, "after": None} | _there(path, prompts)
            facts[key] = [decode(ids) for ids in texts]
            publish_file(path, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
        self.tell(f"{len(texts)} held-out prompts continued ({time.monotonic() - began:.1f} s)")


def facts_of(losses: Mapping[str, Measured], job: Job) -> dict[str, dict[str, Any]]:
    """Measured sets, in the words of source.json; each with the name of its rows, which another one may take."""
    rows = {name: Path(folder).name for name, (folder, _) in job.measure.sets.items()}
    return {
        name: {"eval_loss": _number(each), "perplexity": each.perplexity, "tokens": each.tokens, "rows": rows.get(name)}
        for name, each in losses.items()
    }


def _number(measured: Measured | None) -> float | None:
    return measured.loss if measured is not None and math.isfinite(measured.loss) else None


def _there(path: Path, prompts: list[dict[str, str]]) -> dict[str, Any]:
    """What was said before, to the same prompts."""
    try:
        facts = json.loads(path.read_bytes())
        return {"before": facts["before"]} if facts["prompts"] == prompts else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
