"""The balance loss of a converted model, as its share in the loss of one forward call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from mixhead.errors import MixheadError
from mixhead.models.hugging_face.trace import RoutingTrace


def balance_term(model: Any, trace: RoutingTrace, kwargs: dict[str, Any]) -> Tensor:
    """What the balance loss adds to the loss of this forward call, a 0-d tensor; see `target_share`.

    Args:
        model: the converted model.
        trace: the routings of this call.
        kwargs: the keyword arguments of this call; `labels`, `shift_labels` and `num_items_in_batch` are looked at.
    """
    coefficient = model.config.moh["balance_coefficient"]
    balance = trace.balance_loss()
    if balance is None:
        return torch.zeros(())
    if coefficient > 0.0 and torch.is_grad_enabled() and not balance.requires_grad and checkpoints_reentrantly(model):
        raise MixheadError(
            "Reentrant gradient checkpointing runs the layers without gradients first, so the balance loss would not "
            'train the routers: enable it with {"use_reentrant": False}, the default of transformers 5, or set the '
            "balance coefficient to 0."
        )
    return coefficient * balance * target_share(model, kwargs)


def carried(outputs: Any, balance: Tensor, num_items: Tensor | int | None) -> Any:
    """The outputs of a call that computes no loss, such that whatever is computed from them trains the routers too.

    The Trainer's label smoothing, and losses of one's own, see outputs alone. So the balance loss is carried by the
    logits (or the first tensor): their values stay, and in the backward pass it receives its gradient.

    Args:
        outputs: a ModelOutput or a tuple.
        balance: what the balance loss adds, a 0-d tensor.
        num_items: targets of the whole optimizer step, where the Trainer has told them; see `target_share`.
    """
    if isinstance(outputs, tuple):
        return (BalanceGradient.apply(outputs[0], balance, num_items), *outputs[1:])
    name = "logits" if "logits" in outputs else next(key for key, value in outputs.items() if torch.is_tensor(value))
    outputs[name] = BalanceGradient.apply(outputs[name], balance, num_items)
    return outputs


class BalanceGradient(torch.autograd.Function):
    """Hands a tensor [..., V] on; in the backward pass the balance loss receives its share of the step as gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, balance: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The tensor."""
        ctx.num_items, ctx.dtype = num_items, balance.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """A row with a gradient is a target: their number over those of the step is the share."""
        share = grad.new_ones((), dtype=ctx.dtype)
        if ctx.num_items is not None:
            share = (grad.flatten(0, -2).ne(0).any(-1).sum() / ctx.num_items).to(ctx.dtype)
        return grad, share, None


def target_share(model: Any, kwargs: dict[str, Any]) -> Tensor | float:
    """The share of this forward call in its optimizer step: its number of targets over those of the whole step.

    The `Trainer` hands over `num_items_in_batch`, the number of targets of the whole step, and expects each micro-batch
    to return its share of the step's mean. The balance loss is shared out the same way, or it would count once per
    micro-batch. Without that number (a loop of one's own, or a Trainer that divides afterwards) the share is 1.
    """
    items, targets = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    labels = kwargs.get("labels")
    if targets is None and labels is not None:
        targets = labels[..., 1:] if shifts_labels(model) else labels
    if items is None or targets is None:
        return 1.0
    share: Tensor = targets.ne(-100).sum() / items
    return share


def shifts_labels(model: Any) -> bool:
    """Whether the loss predicts the next token, so that the first label is never a target; as the `Trainer` decides."""
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return loss is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on in its reentrant form."""
    functions = (m._gradient_checkpointing_func for m in model.modules() if getattr(m, "gradient_checkpointing", False))
    return any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)
