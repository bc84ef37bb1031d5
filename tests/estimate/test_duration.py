"""How long a phase takes, told from what it computes."""

from dataclasses import replace
from typing import Any

import pytest

from phased_cpt.estimate.duration import UTILISATION, seconds_by_peak
from tests.estimate.test_memory import ADAPTER

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
GPU = "NVIDIA H100 80GB HBM3"


def test_a_million_positions_take_what_their_operations_do() -> None:
    """49.1 GFLOP a position at 4K (the table of test_flops), at 0.4 of 989 TFLOP/s on eight GPUs: 15.5 s."""
    seconds = seconds_by_peak(LLAMA_8B, replace(ADAPTER, tokens=4096), 1_000_000, 4096.0, GPU)
    assert seconds == pytest.approx(49.14e9 * 1e6 / (UTILISATION * 989e12 * 8), rel=1e-3)
    assert seconds == pytest.approx(15.5, abs=0.1)


@pytest.mark.parametrize(
    ("config", "gpu", "number"),
    [(LLAMA_8B, "of tomorrow", 2), (LLAMA_8B | {"model_type": "mamba2"}, GPU, 2), (LLAMA_8B, GPU, 4)],
)
def test_what_is_not_known_takes_no_time_that_could_be_told(config: dict[str, Any], gpu: str, number: int) -> None:
    assert seconds_by_peak(config, replace(ADAPTER, number=number), 1_000_000, 4096.0, gpu) is None
