"""The rows of a phase for torch, as a DataLoader in one call."""

from pathlib import Path

from torch.utils.data import DataLoader, Dataset, Subset

from phased_cpt.config import RunConfig, from_objects, load
from phased_cpt.data.prepare import prepare
from phased_cpt.errors import InputError
from phased_cpt.evals.rows import Batch, Rows
from phased_cpt.plan import make_plan


def data_loader(
    config: RunConfig | Path | str, phase: str, split: str = "train", batch_size: int | None = None, epochs: float = 1.0
) -> DataLoader[Batch]:
    """The batches of a phase in the order in which a run trains them; what is held out comes in its own order.

    for batch in data_loader("run.yaml", "foundation"):
        model(**batch, use_cache=False).loss.backward()

    With a cache, as models have it by default, the documents of a row would see each other.
    """
    loaded = from_objects(config) if isinstance(config, RunConfig) else load(Path(config).expanduser())
    prepared = prepare(make_plan(loaded)).phase(phase)
    if split not in prepared.splits:
        raise InputError(f"{phase} has no split {split!r}; there are {', '.join(prepared.splits)}")
    rows: Dataset[Batch] = Rows(prepared.splits[split].index.blocks)
    settings = prepared.plan.settings
    if split == "train":
        rows = Subset(rows, prepared.order(epochs).tolist())
    micro = settings.training.micro_batch_size if split == "train" else settings.evaluation.micro_batch_size
    return DataLoader(rows, batch_size=batch_size or micro)
