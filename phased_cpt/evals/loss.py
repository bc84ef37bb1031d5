"""The loss of rows without all of their logits: the head of the model is asked for losses, a chunk of tokens at a time.

hidden [rows, tokens, width] ─ head ─ logits [rows, tokens, words] ─ cross-entropy     32K tokens × 152K words: 20 GB
hidden [rows, tokens, width] ─ head, some tokens at a time ─ loss of each row          0.3 GB, the same numbers

The model runs as ever, with another forward at its head for the length of a call: so DeepSpeed gathers the head's
weights under ZeRO-3 as for any module, and nothing else of the model needs to be known.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from phased_cpt.data.blocks import IGNORED
from phased_cpt.evals.heldout import measuring

CHUNK_ELEMENTS = 2**26  # logits of a chunk: 256 MB in fp32; larger ones were not faster
SENTINEL = 50.0  # beyond every soft cap in use

RowLosses = Callable[[Tensor, Tensor, nn.Linear], Tensor]


class ChunkedLoss(torch.autograd.Function):
    """The summed cross-entropy of tokens; what backward needs is computed in forward, so that no logits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, learns: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = [learns and needed for needed in ctx.needs_input_grad]
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[2] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[3] and bias is not None else None
        size = max(128, CHUNK_ELEMENTS // len(weight))
        for begin in range(0, len(labels), size):
            part, right = hidden[begin : begin + size], labels[begin : begin + size]
            logits = linear(part, weight, bias).float()  # the product stays in the weights' type, as the model's own
            norm = logits.logsumexp(-1)
            total += (norm - logits.gather(1, right[:, None]).squeeze(1)).sum()
            if not any(wanted):
                continue
            error = (logits - norm[:, None]).exp_()
            error.scatter_add_(1, right[:, None], torch.full_like(right[:, None], -1, dtype=error.dtype))
            if of_bias is not None:
                of_bias += error.sum(0)
            error = error.to(part.dtype)
            if of_hidden is not None:
                of_hidden[begin : begin + size] = error @ weight
            if of_weight is not None:
                of_weight += (error.T @ part).float()
        found = (of_hidden, of_weight, of_bias)
        ctx.save_for_backward(*(None if grad is None else grad.to(hidden.dtype) for grad in found))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias = (None if part is None else part * grads[0] for part in ctx.saved_tensors)
        return of_hidden, None, of_weight, of_bias, None


def _chunked(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    loss: Tensor = ChunkedLoss.apply(hidden, labels, head.weight, head.bias, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


def _liger(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    if not len(labels):  # a row that fills up the last batch: Liger divides by the length of its chunks, which is 0
        return _chunked(hidden, labels, head)
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(
        head.weight, hidden, labels, head.bias
    )
    return loss.float()


AT_THE_HEAD: dict[str, RowLosses] = {"chunked": _chunked, "liger": _liger}


def row_losses(
    model: Callable[..., Any], head: nn.Module | None, batch: dict[str, Tensor], kind: str, joined: bool = False
) -> Tensor:
    """The summed loss of each row, one token predicting the next; what is ignored never reaches the head.

    `joined`: the rows stand behind each other in one. Their positions begin anew, so to the model that is the same;
    flash attention looks for documents in a batch of one row alone, and lets them see each other in a larger one.
    """
    labels = batch["labels"]
    shape = (1, -1) if joined else labels.shape
    inputs = {name: batch[name].reshape(shape) for name in ("input_ids", "position_ids")} | {"use_cache": False}
    if kind == "plain":
        logits = model(**inputs).logits
        logits = logits.view(*labels.shape, logits.shape[-1])[:, :-1].float()
        each = cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
        return each.sum(1)

    assert isinstance(head, nn.Linear)

    def of_rows(hidden: Tensor) -> Tensor:
        rows = zip(hidden.view(*labels.shape, -1)[:, :-1], labels[:, 1:], strict=True)
        kept = [(row[right != IGNORED], right[right != IGNORED]) for row, right in rows]
        return torch.stack([AT_THE_HEAD[kind](row, right, head) for row, right in kept])

    with _head_does(head, of_rows):
        found: Tensor = model(**inputs).logits
    return found


@contextlib.contextmanager
def _head_does(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


# Which loss is in use -------------------------------------------------------------------------------------------------


def chosen_loss(asked: str, model: nn.Module, head: nn.Module | None, device: torch.device) -> tuple[str, str]:
    """What computes the loss, and why it is not what was asked for (or nothing). Collective: the model runs once."""
    if asked == "plain":
        return "plain", ""
    if type(head) is not nn.Linear:
        return "plain", "its head is no plain linear layer"
    if not _head_is_last(model, head, device):
        return "plain", "the model changes the logits behind its head"
    if asked == "liger" or (asked == "auto" and device.type == "cuda"):
        if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
            return "liger", ""
        if asked == "liger":
            return "chunked", "liger needs a GPU and `pip install liger-kernel`"
    return "chunked", ""


def _head_is_last(model: nn.Module, head: nn.Linear, device: torch.device) -> bool:
    """Whether the model hands out what its head says, unscaled and uncapped."""
    said = torch.linspace(-SENTINEL, SENTINEL, 8, device=device, dtype=head.weight.dtype).expand(1, 4, 8)
    ids = torch.zeros((1, 4), dtype=torch.long, device=device)
    with torch.no_grad(), measuring(model), _head_does(head, lambda hidden: said):
        heard = model(input_ids=ids, position_ids=torch.arange(4, device=device)[None], use_cache=False).logits
    return heard.shape == said.shape and bool((heard == said).all())
