"""The loss on held-out documents: a mean over tokens, the same for any number of ranks and any batch.

rows of a set in one list ─ each rank its share, in equal numbers of forwards ─ (loss, tokens) of each row ─ summed
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torch.utils.data import default_collate

from phased_cpt.data.blocks import IGNORED

LARGEST_EXPONENT = 700.0  # exp(710) is beyond floats


class RowSet(Protocol):
    """The held-out rows of a phase."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Measured:
    """What a model loses on a set."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float | None:
        """None where it is too large for a number."""
        return math.exp(self.loss) if self.loss < LARGEST_EXPONENT else None


def held_out_losses(
    model: nn.Module,
    losses: Callable[[dict[str, Tensor]], Tensor],
    sets: Mapping[str, RowSet],
    *,
    batch_rows: int,
    rank: int,
    ranks: int,
    device: torch.device,
) -> dict[str, Measured]:
    """The loss of every set. Collective: every rank calls it, and forwards equally often.

    Unequal counts of forwards hang ZeRO-3 for ever, so a rank without a row left repeats one and throws it away. A
    batch holds rows of one set: those of another phase may have another length, and a set is measured to the same bits
    whatever is measured beside it.
    """
    measured = {}
    with torch.no_grad(), measuring(model):
        for name, rows in sets.items():
            found = torch.zeros((len(rows), 2), dtype=torch.float64, device=device)
            for begin in range(0, len(rows), ranks * batch_rows):
                mine = range(begin + rank * batch_rows, min(begin + (rank + 1) * batch_rows, len(rows)))
                batch = default_collate([rows[at] for at in (mine or range(1))])
                batch = {key: values.to(device) for key, values in batch.items()}
                total = losses(batch).double()
                if len(mine):
                    found[mine.start : mine.stop, 0] = total
                    found[mine.start : mine.stop, 1] = (batch["labels"][:, 1:] != IGNORED).sum(1)
            if ranks > 1:
                all_reduce(found, ReduceOp.SUM)  # each row was written by one rank: nothing depends on an order of sums
            loss, tokens = found.sum(0).tolist()
            measured[name] = Measured(loss / tokens if tokens else 0.0, int(tokens))
    return measured


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """In eval mode, and then as it was: the mode of every module, and the random numbers to come."""
    modes = {module: module.training for module in model.modules()}
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # On a CPU a forward in eval mode packs 4-bit weights anew, and what is unpacked later are other weights.
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1])
