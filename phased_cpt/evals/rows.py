"""Prepared blocks as rows for torch."""

import torch
from torch.utils.data import Dataset

from phased_cpt.data.blocks import Blocks

Batch = dict[str, torch.Tensor]


class Rows(Dataset[Batch]):
    """Blocks as tensors; each row is made when it is asked for."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, block: int) -> Batch:
        row = self.blocks[block]
        return {
            "input_ids": torch.from_numpy(row["input_ids"]),
            "position_ids": torch.from_numpy(row["position_ids"]),
            "labels": torch.from_numpy(row["labels"]),
        }
