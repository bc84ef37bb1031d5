"""How a phase publishes: its best weights, or the last, checked tensor by tensor and named by what they are."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from phased_cpt.job import Job
from phased_cpt.plan import PhasePlan
from phased_cpt.published import Source, weights_digest
from phased_cpt.train.engine import Rank, meet
from phased_cpt.train.publish import BUILDING, eval_final, publish, require_sound, saved_names, staged, write_weights
from phased_cpt.train.row import PublishedRow, facts_of
from phased_cpt.train.saves import Saves
from phased_cpt.train.standing import Standing
from phased_cpt.train.watch import told


@dataclass(frozen=True)
class Publication:
    """What is known of the weights that are to be published."""

    job: Job
    phase: PhasePlan
    rank: Rank
    saves: Saves
    standing: Standing
    row: PublishedRow
    tell: Callable[[str], None]
    beat: Callable[[], None]

    @property
    def step(self) -> int:
        """After which the weights were what they are."""
        return self.standing.best.step if self.saves.best and self.standing.best else self.standing.step

    def judge(self) -> None:
        """By the gate of the phase, against what was measured before it."""
        measured, own = self.standing.measured, self.phase.name
        self.row.judge(measured.get(0, {}).get(own), measured.get(self.step, {}).get(own))

    def publish(self, model: nn.Module) -> None:
        """Collective; the first rank writes."""
        phase_folder, slot = self.job.run.root / self.phase.folder, self.saves.best
        folder = staged(phase_folder, slot) if self.rank.first else phase_folder / BUILDING
        if slot is None:
            write_weights(model, folder, writes=self.rank.first, beat=self.beat)
        names = saved_names(model, list(self.standing.first_bits))
        weights = dict(model.named_parameters())
        expected = {saved: _shape(weights[name]) for name, saved in names.items()}
        first = {saved: self.standing.first_bits[name] for name, saved in names.items()}
        if self.rank.first:
            require_sound(folder, expected, first)
            for path in (self.job.run.root / "tokenizer").iterdir():
                shutil.copy(path, folder)
            source = self._source(folder)
            self._warn(source)
            facts = {"phase": source.phase, "step": source.step, "why": source.why, **source.end, "row": source.row}
            if self.job.evaluated:
                eval_final(phase_folder, facts | {"start": source.start})
            place = publish(folder, phase_folder, source)
            self.tell(f"published {place.relative_to(self.job.run.root)}: step {source.step} ({source.why})")
        meet(self.rank)

    def _source(self, folder: Path) -> Source:
        measured, own, model = self.standing.measured, self.phase.name, self.phase.model
        figures = {at: told(own, sets[own]) for at, sets in measured.items() if own in sets}
        kept: dict[str, str] = {"precision": model.precision, "storage": model.bnb_4bit_quant_storage}
        return Source(
            phase=own,
            fingerprint=self.job.fingerprint,
            kind="adapter" if self.phase.settings.lora.enabled else "base",
            digest=weights_digest(folder),
            step=self.step,
            steps=self.standing.step,
            why=self._why(),
            tokens=self.standing.tokens_seen,
            seconds=round(self.standing.seconds, 1),
            base=self.job.start.base_digest,
            commit=self.job.start.commit,
            four_bits=kept if model.use_4bit else None,
            start=figures.get(0, {}),
            end=figures.get(self.step, {}),
            row_before=facts_of(measured.get(0, {}), self.job) if self.job.measure.before else {},
            row=facts_of(self.row.losses, self.job),
            row_before_seconds=round(self.standing.row_before_seconds, 2),
            row_seconds=round(self.row.seconds, 2),
            gate=asdict(self.row.verdict) if self.row.verdict else None,
        )

    def _why(self) -> str:
        weights = self.phase.settings.evaluation.best_of
        if self.saves.best and weights:
            return f"lowest held-out loss of {', '.join(f'{name} × {each:g}' for name, each in weights.items())}"
        if self.saves.best:
            return "lowest held-out loss"
        if self.phase.name not in self.job.evaluated:
            return "the last step; nothing is held out"
        return "the last step, as evaluation.publish says"

    def _warn(self, source: Source) -> None:
        if source.start and source.end and source.end["eval_loss"] >= source.start["eval_loss"]:
            figures = f"{source.start['eval_loss']:.4f} before, {source.end['eval_loss']:.4f} after"
            self.tell(
                f"careful: its held-out documents are worse than before, and the next phase starts here ({figures})"
            )


def _shape(weight: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(weight, "ds_shape", weight.shape))
