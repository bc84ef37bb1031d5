"""Training: the room that loads torch; nothing below it does."""

from phased_cpt.evals.rows import Rows
from phased_cpt.train.rows import data_loader

__all__ = ["Rows", "data_loader"]
