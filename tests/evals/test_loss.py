"""T5: the loss in chunks is the plain one, in numbers and in gradients, without the logits of a row ever being there."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from phased_cpt.evals import loss
from phased_cpt.evals.loss import chosen_loss, row_losses
from tests.train.shapes import batch_of, rows_with

TIGHT = 1e-6  # in fp32, of the largest number there is
CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def model_of(kind: str, **shape: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **shape}))
    for weight in model.parameters():
        if weight.dim() == 1:
            nn.init.normal_(weight, 1)  # a bias of zeros would prove nothing
    return model


def losses_and_gradients(model: PreTrainedModel, batch: dict[str, Tensor], kind: str) -> tuple[Tensor, list[Tensor]]:
    """Rows count differently, so that a gradient cannot be right in sum and wrong in its parts."""
    model.zero_grad()
    losses = row_losses(model, model.get_output_embeddings(), batch, kind)
    (losses * torch.arange(1, len(losses) + 1)).sum().backward()
    return losses.detach(), [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def apart(ones: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference, as a share of the largest number; that of a bias of keys is nothing but rounding."""
    difference = max(float((a - b).abs().max()) for a, b in zip(ones, others, strict=True))
    return difference / max(float(each.abs().max()) for each in others)


HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    "frozen": lambda: frozen(model_of("llama")),
    "trained": lambda: model_of("llama", tie_word_embeddings=False),
    "tied": lambda: model_of("llama", tie_word_embeddings=True),
    "with a bias": lambda: model_of("phi", num_key_value_heads=4),
    "with a frozen bias": lambda: frozen(model_of("phi", num_key_value_heads=4)),
}


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.get_output_embeddings().requires_grad_(False)
    return model


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [1, 2**26], ids=["three chunks", "one chunk"])
def test_chunks_have_the_loss_and_the_gradients_of_the_whole(
    head: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 300 tokens with all labels, some, one and none; a chunk has 128 tokens at least."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    model, batch = HEADS[head](), batch_of(rows_with([299, 17, 1, 0], tokens=300))
    plain, of_plain = losses_and_gradients(model, batch, "plain")
    chunked, of_chunked = losses_and_gradients(model, batch, "chunked")
    assert plain[3] == chunked[3] == 0
    assert torch.allclose(chunked, plain, rtol=TIGHT)
    assert apart(of_chunked, of_plain) <= 2 * TIGHT
    other, of_other = losses_and_gradients(model, batch_of(rows_with([299, 18, 1, 0], tokens=300)), "plain")
    assert not torch.allclose(other, plain, rtol=TIGHT), "the control: a label more"
    assert apart(of_other, of_plain) > 100 * TIGHT


def test_in_bf16_chunks_are_as_near_to_the_truth_as_the_whole() -> None:
    batch = batch_of(rows_with([299, 17, 1, 0], tokens=300))
    truth, of_truth = losses_and_gradients(model_of("llama"), batch, "plain")
    plain, of_plain = losses_and_gradients(model_of("llama").bfloat16(), batch, "plain")
    chunked, of_chunked = losses_and_gradients(model_of("llama").bfloat16(), batch, "chunked")
    assert chunked.dtype == torch.float32, "a sum of losses needs more digits than bf16 has"
    assert torch.allclose(chunked, plain, rtol=1e-6)
    assert torch.allclose(chunked, truth, rtol=2e-3)
    assert apart(of_chunked, of_truth) <= 1.2 * apart(of_plain, of_truth) <= 0.1


def test_nothing_learns_from_what_is_only_measured() -> None:
    model, batch = model_of("llama"), batch_of(rows_with([63, 5]))
    with torch.no_grad():
        measured = row_losses(model, model.get_output_embeddings(), batch, "chunked")
    trained = row_losses(model, model.get_output_embeddings(), batch, "chunked")
    assert torch.equal(measured, trained)
    assert trained.requires_grad and not measured.requires_grad


# Memory ---------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that is made, forward and backward."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(made) if isinstance(each, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return made


def test_the_logits_of_a_row_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 rows of 512 tokens over 8192 words: 8.4 M logits, of which a chunk has 1 M."""
    tokens, words, chunk = 512, 8192, 2**20
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    batch, made, kept = batch_of(rows_with([511, 511], tokens=tokens, words=words)), {}, {}
    for kind in ("chunked", "plain"):
        model = frozen(model_of("llama", vocab_size=words))
        saved: list[int] = []

        def packed(each: Tensor, into: list[int] = saved) -> Tensor:
            into.append(each.numel())
            return each

        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(packed, lambda each: each):
            losses_and_gradients(model, batch, kind)
        made[kind], kept[kind] = largest.numbers, max(saved)
    assert made["chunked"] <= chunk < made["plain"]
    assert made["plain"] >= 2 * (tokens - 1) * words, "the control: all of them"
    assert kept["chunked"] <= 2 * tokens * SHAPE["intermediate_size"] < kept["plain"], "between forward and backward"


# Which loss is in use -------------------------------------------------------------------------------------------------

CHANGED = {
    "a soft cap (Gemma 2)": ("gemma2", {}),
    "a divisor (Granite)": ("granite", {"logits_scaling": 8.0}),
    "a factor (Cohere)": ("cohere", {"logit_scale": 0.0625}),
}


def chosen(model: nn.Module, asked: str = "auto") -> tuple[str, str]:
    return chosen_loss(asked, model, model.get_output_embeddings(), CPU)


@pytest.mark.parametrize("how", CHANGED)
def test_logits_that_are_changed_behind_the_head_are_noticed(how: str) -> None:
    kind, shape = CHANGED[how]
    model, batch = model_of(kind, **shape), batch_of(rows_with([63, 5]))
    for asked in ("auto", "chunked", "liger"):
        assert chosen(model, asked) == ("plain", "the model changes the logits behind its head")
    plain, _ = losses_and_gradients(model, batch, "plain")
    with torch.no_grad():
        own = model(**{**batch, "labels": batch["labels"]}, use_cache=False).loss
    assert float(plain.sum() / 68) == pytest.approx(float(own), rel=TIGHT), "plain is what the model says itself"
    with torch.no_grad():  # the head that is asked for losses has its logits changed, too
        wrong = row_losses(model, model.get_output_embeddings(), batch, "chunked")
    assert not torch.allclose(wrong, plain, rtol=1e-3), "the control: chunks would be wrong here"


def test_a_scale_of_one_changes_nothing_and_is_taken() -> None:
    model, batch = model_of("granite", logits_scaling=1.0), batch_of(rows_with([63, 5]))
    assert chosen(model) == ("chunked", "")
    plain, chunked = (losses_and_gradients(model, batch, kind)[0] for kind in ("plain", "chunked"))
    assert torch.allclose(plain, chunked, rtol=TIGHT)


def test_what_is_asked_for_is_taken_where_it_can_be() -> None:
    model = model_of("llama")
    assert {asked: chosen(model, asked) for asked in ("auto", "chunked", "plain", "liger")} == {
        "auto": ("chunked", ""),
        "chunked": ("chunked", ""),
        "plain": ("plain", ""),
        "liger": ("chunked", "liger needs a GPU and `pip install liger-kernel`"),
    }


def test_a_head_that_is_more_than_a_matrix_is_left_alone() -> None:
    class Scaled(nn.Linear):
        pass

    model = model_of("llama")
    model.lm_head = Scaled(32, 512, bias=False)
    assert chosen(model) == ("plain", "its head is no plain linear layer")
    assert chosen_loss("auto", model, None, CPU) == ("plain", "its head is no plain linear layer")


def test_choosing_leaves_the_model_as_it_was() -> None:
    model = model_of("llama").train()
    model.model.eval()
    before, forward = [module.training for module in model.modules()], model.lm_head.forward
    state = torch.get_rng_state()
    chosen(model)
    assert before == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert model.lm_head.forward == forward and "forward" not in model.lm_head.__dict__


def test_the_head_is_itself_again_after_a_failure() -> None:
    model = model_of("llama")
    with pytest.raises(IndexError):
        row_losses(model, model.lm_head, batch_of(rows_with([63], words=4096)), "chunked")  # words that it has not
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("aux", [False, True])
def test_the_loss_of_a_router_is_left_out_by_both(aux: bool) -> None:
    """Mixtral adds it to its own loss when it is asked to; what is trained here is the cross-entropy alone."""
    model = model_of("mixtral", num_local_experts=4, output_router_logits=aux).eval()
    batch = batch_of(rows_with([63, 5]))
    assert chosen(model) == ("chunked", "")
    plain, of_plain = losses_and_gradients(model, batch, "plain")
    chunked, of_chunked = losses_and_gradients(model, batch, "chunked")
    assert torch.allclose(chunked, plain, rtol=TIGHT)
    assert apart(of_chunked, of_plain) <= 5 * TIGHT
    own = float(model(**batch, use_cache=False).loss.detach())
    assert (own - float(plain.sum()) / 68 > 1e-3) == aux


# Liger, as far as it can be looked at without a GPU -------------------------------------------------------------------


def test_liger_is_never_asked_for_a_row_without_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks are next_power_of_2(0) tokens long then, and it divides by their length. Rows that fill up are such."""

    class Stub:
        def __init__(self, reduction: str, accum_dtype: torch.dtype) -> None:
            assert (reduction, accum_dtype) == ("sum", torch.float32)

        def __call__(self, weight: Tensor, hidden: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
            assert len(labels), "integer division by zero"
            return nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    place = "liger_kernel.transformers.fused_linear_cross_entropy"
    for name in ("liger_kernel", "liger_kernel.transformers", place):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Stub))  # type: ignore[arg-type]
    model, batch = model_of("llama"), batch_of(rows_with([63, 0, 5]))
    plain, of_plain = losses_and_gradients(model, batch, "plain")
    liger, of_liger = losses_and_gradients(model, batch, "liger")
    assert torch.allclose(liger, plain, rtol=TIGHT)
    assert apart(of_liger, of_plain) <= 5 * TIGHT
    nothing, of_nothing = losses_and_gradients(model, batch_of(rows_with([0, 0])), "liger")
    assert not nothing.any() and len(of_nothing) == len(of_plain), "every weight is reached all the same"


@pytest.mark.parametrize("kind", ["plain", "chunked"])
def test_rows_that_are_joined_are_the_same_to_the_model(kind: str) -> None:
    """As flash attention needs them; the control is a model that sees across where they are joined."""
    model, batch = model_of("llama"), batch_of(rows_with([299, 17, 1, 0], tokens=300))
    head = model.get_output_embeddings()
    apart_, joined = (row_losses(model, head, batch, kind, joined=each) for each in (False, True))
    assert torch.allclose(joined, apart_, rtol=TIGHT)
    seamless = {**batch, "position_ids": torch.arange(4 * 300).view(4, 300) % 512}
    across = row_losses(model, head, seamless, kind, joined=True)
    assert not torch.allclose(across[1:3], apart_[1:3], rtol=TIGHT)
