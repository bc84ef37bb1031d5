"""The speed of a phase as a share of a GPU's peak, counted by hand beside it."""

from collections.abc import Callable

import pytest
from transformers import AutoConfig

from phased_cpt.config import Loaded
from phased_cpt.model.cost import cost_of
from phased_cpt.plan import make_plan
from tests.conftest import with_phases
from tests.data.shapes import Prepared

LENGTHS = [40, 24, 64]  # one row of two documents, one row of one


def test_utilisation_counts_every_position_of_a_document(loaded: Callable[..., Loaded]) -> None:
    text = "data: {max_tokens: 64, overlap_tokens: 0}\nlora: {r: 8, target_modules: auto}\n"
    (phase,) = make_plan(loaded(with_phases(text))).phases
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **shape, num_attention_heads=4, num_key_value_heads=4)
    cost = cost_of(config, phase, Prepared(LENGTHS, 64, 0).blocks, "NVIDIA H200", gpus=2)
    assert cost is not None
    layers, head, adapters = 2 * (4 * 64 * 64 + 3 * 64 * 128), 64 * 512, 2 * 8 * (4 * 128 + 3 * 192)
    attention = 2 * 2 * 64 * (40**2 + 24**2 + 64**2) / 128
    token = 4 * layers + 4 * head + 6 * adapters + 3 * attention
    assert cost.flops.model == pytest.approx(token)
    positions = 128 / 125  # three documents, whose first tokens are computed and not trained
    assert cost.utilisation(1e9)["mfu"] == pytest.approx(1e9 * positions / 2 * token / 989e12, abs=1e-4)
    assert cost.utilisation(1e9)["hfu"] > cost.utilisation(1e9)["mfu"], "checkpointing computes again"
    assert "989 TFLOP/s (NVIDIA H200)" in str(cost)


@pytest.mark.parametrize("gpu", ["", "NVIDIA Unheard Of 9000"])
def test_no_share_of_a_peak_that_is_not_known(gpu: str, loaded: Callable[..., Loaded]) -> None:
    (phase,) = make_plan(loaded(with_phases(""))).phases
    config = AutoConfig.for_model("llama")
    assert cost_of(config, phase, Prepared(LENGTHS, 64, 0).blocks, gpu, gpus=1) is None
