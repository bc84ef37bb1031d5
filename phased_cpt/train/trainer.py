"""The Trainer, with three things of its own: the learning rate of the plan, the loss over all tokens of a batch, and
random numbers that depend on the row alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer

from phased_cpt.data.blocks import IGNORED, Blocks
from phased_cpt.data.chunks import Integers
from phased_cpt.data.mixing import seed_of
from phased_cpt.errors import Diverged
from phased_cpt.evals.rows import Batch, Rows

EMPTY = -1  # in the order: a row without a label, which fills up the last batch


class TrainedRows(Dataset[Batch]):
    """The rows of a phase in the order in which they are trained, each with its place in it."""

    def __init__(self, blocks: Blocks, order: Integers, begin: int = 0) -> None:
        self.rows, self.order, self.begin = Rows(blocks), order, begin  # those before are trained already

    def __len__(self) -> int:
        return len(self.order) - self.begin

    def __getitem__(self, left: int) -> Batch:
        place = self.begin + left
        block = int(self.order[place])
        row = self.rows[max(block, 0)]
        if block == EMPTY:
            row["labels"] = torch.full_like(row["labels"], IGNORED)
        return row | {"place": torch.tensor(place)}


class PhaseTrainer(Trainer):
    """One phase."""

    def __init__(
        self,
        *,
        losses: Callable[[Batch], Tensor],
        rate: Callable[[int], float],
        faster: float | None,
        seed: tuple[str | int, ...],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.losses, self.rate, self.faster, self.seed = losses, rate, faster, seed
        self.model_accepts_loss_kwargs = True  # the tokens of the whole batch are counted, and the loss divided by them
        self.step_tokens = 0
        self._doubtful: list[tuple[Tensor, Tensor]] = []  # of the micro batches of a step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """LoRA+: the matrices B in a group of their own, behind that of A, whose rate is the one that is told."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        learns = model or self.model
        if is_new and self.faster is not None and learns is not None:
            fast = {weight for name, weight in learns.named_parameters() if ".lora_B." in name}
            for group in list(optimizer.param_groups):
                several, group["params"] = group["params"], [each for each in group["params"] if each not in fast]
                if faster := [weight for weight in several if weight in fast]:
                    optimizer.add_param_group({**group, "params": faster, "lr": group["lr"] * self.faster})
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """DoRA's magnitudes are the lengths of the base's own rows: to decay them is to shrink the model."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if ".lora_magnitude_vector." not in name]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """A function of the steps that are done, so that nothing bends it."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            peak = self.args.learning_rate
            self.lr_scheduler = LambdaLR(optimizer, lambda done: self.rate(done) / peak)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The rows' share of the mean over all trained tokens of the global batch; DeepSpeed averages over ranks."""
        assert isinstance(num_items_in_batch, Tensor)
        self._seed(self._place())
        # Where no row of a step has a label there is nothing to learn, which is no 0 / 0.
        loss = self.losses(inputs).sum() * (self.args.world_size / num_items_in_batch.clamp(min=1))
        self._doubtful.append((inputs["place"], loss.detach()))
        if self.accelerator.sync_gradients:  # only here does the CPU wait for the GPU
            self.step_tokens = int(num_items_in_batch)
            self._require_finite()
        return loss

    def _place(self) -> int:
        """The place of the first row of this micro batch: the ranks take turns at micro batches."""
        args, of_the_step = self.args, len(self._doubtful)
        turn = self.state.global_step * args.gradient_accumulation_steps + of_the_step
        return int((turn * args.world_size + args.process_index) * args.per_device_train_batch_size)

    def _seed(self, place: int) -> None:
        """Dropout depends on the rows and the step: not on ranks, evaluations or where the run was stopped."""
        torch.manual_seed(seed_of(*self.seed, self.state.global_step, place))

    def _require_finite(self) -> None:
        """Looked at once a step, before its last backward, which is where DeepSpeed would update the weights."""
        doubtful, self._doubtful = self._doubtful, []
        bad = torch.stack([~torch.isfinite(each) for _, each in doubtful])
        worst = bad.any().int()
        if self.args.world_size > 1:
            all_reduce(worst, ReduceOp.MAX)
        if worst.item():
            self._tell_who(doubtful, bad)

    def _tell_who(self, doubtful: list[tuple[Tensor, Tensor]], bad: Tensor) -> None:
        guilty = [places.tolist() for (places, _), is_bad in zip(doubtful, bad.tolist(), strict=True) if is_bad]
        rows = [place for places in guilty for place in places]
        everyone: list[Any] = [rows]
        if self.args.world_size > 1:
            everyone = [None] * self.args.world_size
            torch.distributed.all_gather_object(everyone, rows)
        dataset = self.train_dataset
        assert isinstance(dataset, TrainedRows)
        blocks = sorted({int(dataset.order[place]) for part in everyone for place in part})
        raise Diverged(self.state.global_step + 1, blocks)
