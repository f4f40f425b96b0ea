"""The loss of a causal model, a few rows of logits at a time: torch's numbers without its float32 copies of the logits.

torch makes three copies of all logits in float32 on the way to a loss and back: logits, their log-softmax, and its
gradient twice. With 4,096 tokens and 49,152 words that is up to 2.4 GB beside logits and gradient of 0.4 GB in bf16.
Every row's log-softmax and gradient are its own, so that pieces give the same bits; the mean over rows is torch's own,
of one number a row. Where nobody else needs the logits, their gradient takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

PIECE = 1 << 21  # logits at a time: 8 MiB in float32, which caches hold
AT_ONCE = 4  # float32 tensors of a piece that exist together, about

_MEAN, _SUM = 1, 2  # as aten numbers its reductions
_aten = torch.ops.aten


def causal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """What transformers' ForCausalLMLoss gives, bit for bit: cross entropy in float32, labels shifted by one.

    Args:
        logits: [..., vocab_size], of any floating dtype.
        labels: [..., tokens]; a token's label is the one behind it.
        num_items_in_batch: what the sum is divided by; None: the mean over labels that are not ignored.
        shift_labels: labels that are shifted already.
    """
    if shift_labels is None:
        assert labels is not None, "a loss needs labels"
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    wanted = shift_labels.reshape(-1).to(logits.device)
    reduction = _MEAN if num_items_in_batch is None else _SUM
    is_spent = getattr(logits.grad_fn, "gives_up_outputs", False)  # nobody reads these logits after the loss
    loss = _CrossEntropy.apply(logits.view(-1, vocab_size), wanted, ignore_index, reduction, is_spent)
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    return loss


def use_pieces(root: nn.Module) -> Callable[[], None]:
    """Gives a model of transformers this loss in place of the one that it stands for, if it has that; returns the way
    back. Other models keep theirs."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(root, "loss_function", None) is not ForCausalLMLoss:
        return lambda: None
    before = root.__dict__.get("_loss_function")
    root.loss_function = causal_loss  # type: ignore[assignment]

    def back() -> None:
        if before is None:
            root.__dict__.pop("_loss_function", None)
        else:
            root.loss_function = before

    return back


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy of [rows, words] and [rows]. Backward computes the log-softmax of each piece again, and puts the
    gradient in place of the logits where these are spent."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignored: int, reduction: int, is_spent: bool
    ) -> torch.Tensor:
        rows = len(labels)
        picked = torch.empty(
            rows, 1, dtype=torch.float32, device=logits.device
        )  # the log-probability of each row's label
        words = labels.masked_fill(labels == ignored, 0).unsqueeze(1)
        for piece in _pieces(logits):
            picked[piece] = _log_softmax(logits[piece]).gather(1, words[piece])
        column = torch.where(labels == ignored, ignored, 0)  # where a row's log-probability is, now
        loss, weight = _aten.nll_loss_forward(picked, column, None, reduction, ignored)
        ctx.save_for_backward(logits, words, column, weight)
        ctx.ignored, ctx.reduction, ctx.is_spent = ignored, reduction, is_spent
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        logits, words, column, weight = ctx.saved_tensors
        picked = torch.empty(len(column), 1, dtype=torch.float32, device=logits.device)
        each = _aten.nll_loss_backward(grads[0], picked, column, None, ctx.reduction, ctx.ignored, weight)
        found = (
            logits.data if ctx.is_spent else torch.empty_like(logits)
        )  # .data: autograd shall not take it for a change
        sparse = torch.zeros(_rows(logits), logits.shape[1], dtype=torch.float32, device=logits.device)
        for piece in _pieces(logits):
            part = sparse[: len(each[piece])]
            part.scatter_(1, words[piece], each[piece])
            found[piece] = _aten._log_softmax_backward_data(part, _log_softmax(logits[piece]), 1, torch.float32)
            part.scatter_(1, words[piece], 0.0)
        return found, None, None, None, None


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), 1)


def _rows(logits: torch.Tensor) -> int:
    return max(1, min(len(logits), PIECE // max(1, logits.shape[1])))


def _pieces(logits: torch.Tensor) -> Iterator[slice]:
    each = _rows(logits)
    for first in range(0, len(logits), each):
        yield slice(first, min(first + each, len(logits)))
