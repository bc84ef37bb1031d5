from pathlib import Path

import pytest

from tests.launchers.programs import Jobs


@pytest.fixture
def job(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)
