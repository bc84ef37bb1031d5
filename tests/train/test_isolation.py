"""T4: documents in a packed row do not see each other, on the attention in use; and what silently undoes that is seen.

A tiny Llama reads rows as they come out of the data pipeline; each document's losses must be those it has alone.
"""

import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from phased_cpt.data.blocks import IGNORED
from phased_cpt.evals.rows import Rows
from tests.conftest import REPOSITORY
from tests.data.shapes import Prepared

ALIKE, DIFFERENT = 1e-5, 1e-3
LENGTHS = [9, 14, 5, 23, 7, 30, 12]


@pytest.fixture(scope="module")
def packed() -> Prepared:
    return Prepared(LENGTHS, 64, 4)


def llama(attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def losses(model: PreTrainedModel, row: dict[str, torch.Tensor], **how: object) -> torch.Tensor:
    """The loss of every label of a row, in order."""
    without = how.pop("without", ())
    inputs = {key: row[key][None] for key in ("input_ids", "position_ids") if key not in without}  # type: ignore[operator]
    with torch.no_grad():
        logits = model(**inputs, **{"use_cache": False, **how}).logits[0, :-1]
    labels = row["labels"][1:]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)[labels != IGNORED]


def alone(model: PreTrainedModel, packed: Prepared, at: int) -> torch.Tensor:
    """The same losses, each document of the row by itself."""
    row, pieces, begin, found = Rows(packed.blocks)[at], packed.blocks.slices_of(at), 0, []
    for length in pieces.length.tolist():
        part = {key: values[begin : begin + length] for key, values in row.items()}
        if length > 1:
            found.append(losses(model, part))
        begin += length
    return torch.cat(found)


def farthest(model: PreTrainedModel, packed: Prepared, **how: object) -> float:
    rows = Rows(packed.blocks)
    return max(
        float((losses(model, rows[at], **dict(how)) - alone(model, packed, at)).abs().max()) for at in range(len(rows))
    )


@pytest.mark.requirement("K-06")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_in_a_row_do_not_see_each_other(packed: Prepared, attention: str) -> None:
    assert len(packed.blocks) < len(LENGTHS), "several documents share a row"
    assert farthest(llama(attention), packed) <= ALIKE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "how",
    [{"attention_mask": torch.ones(1, 64, dtype=torch.long)}, {"use_cache": True}, {"without": ("position_ids",)}],
    ids=["a mask of ones", "use_cache", "no position_ids"],
)
def test_what_undoes_it_is_seen(packed: Prepared, attention: str, how: dict[str, object]) -> None:
    """The negative controls: each of these is silent, and lets the documents see each other."""
    assert farthest(llama(attention), packed, **how) > DIFFERENT


def test_the_loop_of_the_readme_keeps_documents_apart(packed: Prepared) -> None:
    """What people are told to write, as it stands there."""
    readme = (REPOSITORY / "README.md").read_text()
    (call,) = re.findall(r"# (model\(\*\*batch.*?\)):", readme)
    assert call == "model(**batch, use_cache=False)"
    batch = {key: values[None] for key, values in Rows(packed.blocks)[0].items()}
    for attention in ("eager", "sdpa"):
        model = llama(attention)
        together, silently = (model(**batch, **how).loss for how in ({"use_cache": False}, {}))
        expected = float(alone(model, packed, 0).mean())
        assert float(together.detach()) == pytest.approx(expected, abs=ALIKE)
        assert abs(float(silently.detach()) - expected) > 10 * ALIKE, "the control: even the mean of them all"


def test_a_model_with_absolute_positions_needs_them_to_restart(packed: Prepared) -> None:
    """GPT-2 learns its positions one by one; a rotary model only knows distances, and would not notice."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, attn_implementation="eager")
    absolute, rotary = GPT2LMHeadModel(config).eval(), llama("eager")
    row = Rows(packed.blocks)[0]
    begin = int(packed.blocks.slices_of(0).length[0])
    for model, notices in ((absolute, True), (rotary, False)):
        document = {key: values[begin : begin + 5] for key, values in row.items()}
        shifted = {**document, "position_ids": document["position_ids"] + begin}
        difference = float((losses(model, document) - losses(model, shifted)).abs().max())
        assert difference > DIFFERENT if notices else difference <= ALIKE


def test_the_model_would_stop_only_where_a_document_ends(packed: Prepared) -> None:
    """Every document's EOS is a label, once: what teaches a model to stop."""
    ends = sum(int((Rows(packed.blocks)[at]["labels"] == 1).sum()) for at in range(len(packed.blocks)))
    assert ends == len(LENGTHS)


def test_rows_are_read_where_they_lie(tmp_path: Path, packed: Prepared) -> None:
    row = Rows(packed.blocks)[0]
    assert {values.dtype for values in row.values()} == {torch.int64}
    assert {tuple(values.shape) for values in row.values()} == {(64,)}
