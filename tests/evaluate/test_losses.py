"""The loss of rows in pieces is that of all logits at once, for whatever a model does behind its head."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from phased_cpt.evaluate import losses
from tests.journeys.conftest import SHAPE

pytestmark = pytest.mark.requirement("E-04")

BATCH = {
    "input_ids": torch.arange(300, 600).reshape(2, 150),
    "position_ids": torch.cat([torch.arange(60), torch.arange(90)]).expand(2, 150),
    "labels": torch.arange(300, 600).reshape(2, 150).clone(),
}
BATCH["labels"][0, 60] = BATCH["labels"][:, 0] = -100  # a document begins; the first row has two
BATCH["labels"][1, 20:] = -100
GEMMA = {**SHAPE, "model_type": "gemma2", "head_dim": 16, "sliding_window": 64, "final_logit_softcapping": 0.3}
MIXTRAL = {**SHAPE, "model_type": "mixtral", "num_local_experts": 2}


def made(shape: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{key: value for key, value in shape.items() if key != "model_type"}, model_type=shape["model_type"])  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model


@pytest.mark.parametrize("shape", [SHAPE, GEMMA, MIXTRAL], ids=["llama", "gemma2", "mixtral"])
def test_pieces_make_the_whole(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(shape)
    with torch.no_grad():
        inputs = {name: BATCH[name] for name in ("input_ids", "position_ids")}
        logits = model(**inputs, use_cache=False).logits[:, :-1].double()
        whole = cross_entropy(logits.transpose(1, 2), BATCH["labels"][:, 1:], reduction="none", ignore_index=-100).sum(
            1
        )
        assert losses.row_losses(model, BATCH).tolist() == pytest.approx(whole.tolist(), rel=1e-5)
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 1)  # 128 tokens at a time, so the first row takes two
        assert losses.row_losses(model, BATCH).tolist() == pytest.approx(whole.tolist(), rel=1e-5)
        uncapped = made({**shape, "final_logit_softcapping": None} if shape is GEMMA else SHAPE)
        other = losses.row_losses(uncapped, BATCH).tolist()
    assert (other != pytest.approx(whole.tolist(), rel=1e-3)) == (shape is not SHAPE), "what is behind the head counts"
    assert "forward" not in model.base_model.__dict__, "the model is as it was"
