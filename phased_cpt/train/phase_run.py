"""What a rank does while it trains a phase: load, train, save, publish, each step of it in order."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PrinterCallback

from phased_cpt.data.index import open_blocks
from phased_cpt.data.mixing import seed_of, training_order
from phased_cpt.errors import Interrupted, PhasedCptError
from phased_cpt.evals import HOOKS, Measured
from phased_cpt.evals.loss import chosen_loss, row_losses
from phased_cpt.evals.rows import Rows
from phased_cpt.job import SMOKE_EVAL_ROWS, Job
from phased_cpt.model.adapter import adapt, base_of, described, stacked
from phased_cpt.model.base import head_of, load_base, this_device
from phased_cpt.model.cost import Cost, cost_of
from phased_cpt.plan import PhasePlan
from phased_cpt.pulse import Beating
from phased_cpt.run_dir import CHECKPOINTS
from phased_cpt.schedule import evaluation_steps
from phased_cpt.stopping import Stopping, Wish
from phased_cpt.train import checkpoint
from phased_cpt.train.arguments import training_arguments
from phased_cpt.train.checks import Learning, frozen_sum, leak, require_base_unmoved
from phased_cpt.train.engine import Rank, agreed, memory_bytes, tear_down
from phased_cpt.train.masters import Masters, before_the_engine, bit_sums, put_back, show, trained
from phased_cpt.train.publication import Publication
from phased_cpt.train.publish import saved_names
from phased_cpt.train.row import PublishedRow
from phased_cpt.train.saves import Saves
from phased_cpt.train.trainer import PhaseTrainer, TrainedRows
from phased_cpt.train.watch import Course, Listener, Watch

LEAK = 0.01  # of what a change does without a border between documents; rounding does less, a leak does all of it


class PhaseRun:
    """What a rank holds while it trains a phase."""

    def __init__(
        self,
        job: Job,
        phase: PhasePlan,
        rank: Rank,
        listener: Listener,
        stop: Stopping,
        pulse: Beating,
        to_the_end: contextlib.ExitStack,
    ) -> None:
        self.job, self.phase, self.rank, self.listener = job, phase, rank, listener
        self.stop, self.pulse, self.to_the_end = stop, pulse, to_the_end
        self.folder = job.run.root / phase.folder
        self.resume = Path(job.resume) if job.resume else None
        self.standing = checkpoint.standing_of(self.resume)
        self.saves = Saves(self.folder / CHECKPOINTS, job, phase, rank, self.standing, self._tell, pulse.beat)
        self.device = this_device()
        self.blocks = open_blocks(Path(job.train))
        self.sets = {name: self._held_out(Path(folder)) for name, folder in job.evaluated.items()}
        self.row = PublishedRow(job, phase, rank.first, self.device, self._tell, pulse.beat)
        # Before the model: under ZeRO-3 it is split while it is loaded.
        self.arguments = training_arguments(phase, job.deepspeed, self.saves.folder)
        self.loss = ""
        self._reached = False  # by the gradient, every weight, in this attempt
        assert phase.schedule is not None
        self._schedule = phase.schedule

    def _held_out(self, folder: Path) -> Rows:
        blocks = open_blocks(folder)
        return Rows(blocks.first_rows(SMOKE_EVAL_ROWS) if self.job.smoke else blocks)

    # Start ------------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """The base and the adapter on it: of a checkpoint as of any start, for its weights are as published ones."""
        started = time.monotonic()
        self.pulse.beat("loading the model", self.standing.step)
        start, model, settings = self.job.start, self.phase.model, self.phase.settings
        whole = self.resume if not settings.lora.enabled else None
        base = load_base(
            whole or Path(start.base),
            precision=model.precision,
            attention=model.attention,
            max_tokens=max([settings.data.max_tokens, *self.row.lengths]),  # rows of other phases are measured, too
            storage=model.bnb_4bit_quant_storage if model.use_4bit else None,
            trust_remote_code=model.trust_remote_code,
            tell=self.listener.tell,
        )
        before = Path(start.adapter) if start.adapter else None
        adapter = self.resume or before if settings.lora.enabled else None
        seed = seed_of("adapter", self.phase.seed, self.phase.name) % 2**63
        self.model = stacked(adapt(base, adapter, settings.lora, seed), [Path(each) for each in start.below])
        self.head = head_of(base)
        self.first = before_the_engine(self.model) | self._as_published(adapter or whole or Path(start.base))
        seconds, kernel = time.monotonic() - started, base.config._attn_implementation
        self._tell(f"loaded {whole or start.base} in {seconds:.1f} s, attention {kernel}")
        self._tell(self._trainable())

    def _as_published(self, folder: Path) -> Masters:
        """The first weights as they are on disk, in fp32: what is loaded into a model may have been rounded."""
        found = {}
        names = {
            saved: name for name, saved in saved_names(self.model, [name for name, _ in trained(self.model)]).items()
        }
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for saved in names.keys() & set(file.keys()):
                    tensor = file.get_tensor(saved)
                    if tensor.dtype == torch.float32:
                        found[names[saved]] = tensor
        return found

    def _trainable(self) -> str:
        sizes = [(getattr(w, "ds_numel", w.numel()), w.requires_grad) for w in self.model.parameters()]
        learns, every = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
        packed = " (4-bit weights are packed two in one)" if self.phase.model.use_4bit else ""
        how = f"; {described(self.model)}" if self.phase.settings.lora.enabled else ""
        return f"trainable parameters: {learns:,} of {every:,}, {learns / every:.2%}{packed}{how}"

    # Training ---------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Every step of it that is left."""
        self.saves.require_room(self.model)
        if self.resume:
            cools = ", cooling down" if self.standing.cooling else ""
            self._tell(f"goes on after step {self.standing.step} of {self.phase.steps} ({self.resume.name}{cools})")
        self.pulse.beat("starting the engine")
        begin = self.standing.step * (self.phase.global_rows or 0)
        self.trainer = PhaseTrainer(
            losses=self._losses,
            rate=lambda done: self._schedule.rate(done, self.standing.cooling),
            faster=self.phase.settings.training.lora_plus_ratio if self.phase.settings.lora.enabled else None,
            seed=("dropout", self.phase.seed, self.phase.name),
            model=self.model,
            args=self.arguments,
            train_dataset=TrainedRows(self.blocks, self._order(), begin),
        )
        self.watch = self._watch()
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self.watch)
        self._clock = time.monotonic()
        self.trainer.train()
        self._count_seconds()
        require_base_unmoved(self.frozen, self.model, self.device, self.rank.of)
        if self.watch.is_stopped:
            where = f"{self.phase.name} is stopped after step {self.standing.step} of {self.phase.steps}"
            raise Interrupted(f"{where}, with a checkpoint; the same command goes on")

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.standing.seconds, self._clock = self.standing.seconds + now - self._clock, now

    def _order(self) -> Any:
        phase, rows = self.phase, self.phase.global_rows
        assert phase.steps is not None and rows is not None
        return training_order(
            len(self.blocks),
            phase.steps * rows,
            phase.budget.rows(phase.prepared),
            *phase.data_seed,
            shuffle=phase.shuffles,
        )

    def _losses(self, batch: dict[str, Tensor]) -> Tensor:
        self.pulse.beat(step=self.trainer.state.global_step + 1)
        joined = base_of(self.model).config._attn_implementation.startswith("flash")
        return row_losses(self.trainer.model_wrapped, self.head, batch, self.loss, joined)

    def _begin(self) -> None:
        """The engine is there, and nothing is trained yet, in this attempt."""
        engine = self.trainer.model_wrapped
        if self.resume:
            wrapped: Any = self.trainer.lr_scheduler  # by accelerate
            scheduler = getattr(wrapped, "scheduler", wrapped)
            checkpoint.restore(self.model, engine, scheduler, self.rank, self.resume)
        elif self.job.start.optimizer:
            checkpoint.restore_optimizer(self.model, engine, self.rank, Path(self.job.start.optimizer))
        put_back(self.model, self.first)
        self.first = {}  # they have served
        checkpoint.require_one_weight(self.model)
        if self.resume:
            self._go_on(self.resume)
        else:
            self.standing.first_bits = bit_sums(self.model)
            if carried := self.job.start.optimizer:
                proven = checkpoint.require_restored(self.model, engine, Path(carried))
                self._tell(f"goes on with {proven} moments of the optimizer of the phase before, to the bit")
        self.loss, why = chosen_loss(self.phase.settings.training.loss, engine, self.head, self.device)
        self._tell(f"loss: {self.loss}" + (f", because {why}" if why else ""))
        self._require_isolation(engine)
        self.frozen = frozen_sum(self.model)
        self.learning = Learning(self.model, self.standing.first_bits)
        self.pulse.beat("evaluating before the first step")

    def _ready(self) -> None:
        """From here on there is something to lose: a stop waits for the end of a step, or for the publication."""
        self.stop.require_on()  # somebody may have caught what it was raised as
        self.to_the_end.enter_context(self.stop.held())
        self.pulse.beat("training", self.standing.step)

    def _go_on(self, folder: Path) -> None:
        proven = checkpoint.require_restored(self.model, self.trainer.model_wrapped, folder)
        self._tell(f"weights and {proven} moments of the optimizer are those of {folder.name}, to the bit")
        self.trainer._globalstep_last_logged = self.standing.step  # else the first loss is divided by all steps

    def _require_isolation(self, engine: nn.Module) -> None:
        started = time.monotonic()
        config = base_of(self.model).config
        found = leak(engine, config.get_text_config().vocab_size, self.phase.settings.data.max_tokens, self.device)
        self._tell(
            f"isolation: a document moves the next by {found:.1e} of what it could ({time.monotonic() - started:.1f} s)"
        )
        if math.isnan(found):
            raise PhasedCptError(
                "the model's logits are not finite before it is trained; look at the base it starts from"
            )
        if found > LEAK:
            kernel = config._attn_implementation
            what = f"the attention in use ({kernel}) lets documents of a row see each other ({found:.1%})"
            mend = "take another model.attention, or data.packing: none with one document a row"
            if self.phase.settings.data.isolate_documents:
                raise PhasedCptError(f"{what}; {mend}; to go on all the same: data.isolate_documents: false")
            self._tell(f"{what}; data.isolate_documents: false goes on")

    def _watch(self) -> Watch:
        phase, evaluation = self.phase, self.phase.settings.evaluation
        assert phase.steps is not None and phase.global_rows is not None and phase.positions is not None
        blocks = phase.prepared.epoch_blocks if phase.prepared else len(self.blocks)
        later = sum(each.positions or 0 for each in self.job.plan().phases[phase.number :])
        return Watch(
            course=Course(
                phase=phase.name,
                steps=phase.steps,
                evaluated_at=evaluation_steps(phase.steps, evaluation.every_steps, phase.global_rows, blocks),
                main_set=phase.name if phase.name in self.sets else None,
                best_of=evaluation.best_of,
                patience=evaluation.patience,
                rows_per_step=phase.global_rows,
                blocks=blocks,
                later_steps=later / (phase.positions / phase.steps),
                saved_every=self.job.plan().config.checkpoint.every_steps,
                schedule=self._schedule,
                cooldown_ratio=evaluation.cooldown_ratio,
            ),
            standing=self.standing,
            listener=self.listener,
            at_begin=self._begin,
            ready=self._ready,
            evaluate=self._evaluate,
            check=self._check,
            keep_best=self._keep_best,
            tokens_of_step=lambda: self.trainer.step_tokens,
            utilisation=self._utilisation(),
            skipped=self._skipped,
            wished=self._wished,
            save=self._save,
        )

    def _skipped(self) -> bool:
        """fp16 overflows now and then, and its step is not taken; with other numbers that is no way to go on."""
        return self.phase.model.precision == "fp16" and bool(self.trainer.accelerator.optimizer_step_was_skipped)

    def _utilisation(self) -> Callable[[float], dict[str, float]]:
        """What a line says besides, from tokens a second: the memory, and how much of the GPUs is made use of."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        cost: Cost | None = cost_of(base_of(self.model).config, self.phase, self.blocks, gpu, self.rank.of)
        if cost is not None:
            self._tell(str(cost))
        of_peak = cost.utilisation if cost else lambda speed: {}
        return lambda speed: {**of_peak(speed), "memory_bytes": memory_bytes(self.device)}

    def _evaluate(self) -> dict[str, Measured]:
        rows = self.phase.settings.evaluation.micro_batch_size
        sets = {name: (each, rows) for name, each in self.sets.items()}
        if self.job.measure.before and not self.standing.measured:
            sets |= self.row.sets
            self.row.say(self.trainer.model_wrapped, "before")
        began = time.monotonic()
        found = self._on_sets(sets)
        if self.job.measure.before and not self.standing.measured:
            self.standing.row_before_seconds = time.monotonic() - began
        self.pulse.beat("training")
        return found

    def _on_sets(self, sets: Mapping[str, tuple[Rows, int]]) -> dict[str, Measured]:
        self.pulse.beat("evaluating")
        where = {"rank": self.rank.number, "ranks": self.rank.of, "device": self.device}
        found: dict[str, Measured] = {}
        for name, (rows, batch_rows) in sets.items():
            for hook in HOOKS.values():
                found |= hook(self.trainer.model_wrapped, self._losses, {name: rows}, batch_rows=batch_rows, **where)
        return found

    def _check(self, step: int) -> None:
        if not self._reached:
            self._reached = True
            for name in self.learning.require_reached():
                self._tell(f"no token reached {name} in the first batch")
        if step <= 2:
            self.learning.require_moved(bit_sums(self.model), step)

    # Saving -----------------------------------------------------------------------------------------------------------

    def _wished(self, step: int) -> Wish:
        """What the ranks have agreed on, after a step."""
        if step == self.job.stop_after:
            return Wish.STOP
        return Wish(agreed(self.rank, self.stop.wish()))

    def _save(self) -> None:
        self.pulse.beat("saving a checkpoint")
        self._count_seconds()
        self.saves.checkpoint(self.model, self.trainer.model_wrapped)
        self.stop.saved()
        self.pulse.beat("training")

    def _keep_best(self) -> None:
        self.pulse.beat("saving the best weights")
        self.saves.best_weights(self.model)
        self.pulse.beat("training")

    # Publishing -------------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """What is about to be published, on the held-out documents of every phase; and whether its gate is open."""
        self.saves.carried(self.model, self.trainer.model_wrapped)
        slot, best, wanted = self.saves.best, self.standing.best, self.job.measure.after
        if wanted and slot is not None:
            show(self.model, self._as_published(slot))
        if wanted:
            self.row.measure(self._on_sets)
            mixed = bool(self.phase.settings.evaluation.best_of)
            self.row.require_as_measured(best.loss if slot and best and not mixed else None)
        self._publication().judge()
        if wanted:
            self.pulse.beat("going on with held-out prompts")
            self.row.say(self.trainer.model_wrapped, "after")

    def publish(self) -> None:
        """The best weights, or the last."""
        self.pulse.beat("publishing")
        self._publication().publish(self.model)

    def _publication(self) -> Publication:
        what = self.job, self.phase, self.rank, self.saves, self.standing, self.row
        return Publication(*what, self._tell, self.pulse.beat)

    # Around it --------------------------------------------------------------------------------------------------------

    def tear_down(self) -> None:
        tear_down(self.trainer)
        del self.model, self.head, self.learning, self.watch, self.trainer

    def _tell(self, message: str) -> None:
        self.listener.tell(f"{self.phase.name}: {message}")
