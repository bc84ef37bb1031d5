"""Ranks, as for the tests of training."""

from tests.journeys.conftest import zygote  # noqa: F401 - fixtures
from tests.train.conftest import phases  # noqa: F401
