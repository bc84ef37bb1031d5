"""The estimate of a merge beside real ones on the CPU; and wrong ones, which the same comparison finds.

Where what waits for the writer counts, the estimate is the most that there can be: on two cores the writer keeps up,
and what is measured is less. So those are held to between 0.85 and 1.5 of what is measured, the others to 15 %.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from benchmarks.memory import MERGES, merge_measured, merge_predicted
from phased_cpt.estimate import merging
from phased_cpt.estimate.architecture import architecture_of
from phased_cpt.estimate.merging import MergeRecipe, merge_estimate
from phased_cpt.merge import choice, shards, story, texts, walk
from tests.estimate.test_flops import CONFIGS if False else None
