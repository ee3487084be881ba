"""Cross entropy and distillation loss of a causal language model, a few rows of logits at a time.

A vocabulary of 49,152 makes the logits the largest tensor of a training step. The stock loss keeps about four copies of
them in float32; here only the logits themselves and their gradient exist at full size, in the dtype of the model.

Shape legend of this file: B windows, T tokens in a window, R = B * T rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixhead.errors import MixheadError

IGNORED = -100  # a label that is no target, as everywhere in transformers
_CHUNK_NUMBERS = 1 << 18  # logits held in float32 at once, 1 MiB: they stay in the cache of a core


def next_token_losses(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    num_targets: Tensor | float,
    teacher_logits_BTV: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Cross entropy with the next token, and the divergence from a teacher, both as shares of the step's mean.

    Position t predicts label t + 1; positions whose next label is -100 count in neither. Both are sums over the
    positions of this call divided by `num_targets`, so that the sum over the micro-batches of a step is its mean.

    Args:
        logits_BTV: the student's.
        labels_BT: token ids, not shifted; -100 where nothing is to be predicted.
        num_targets: targets of the whole optimizer step, over all micro-batches and processes.
        teacher_logits_BTV: the teacher's at the same positions; it receives no gradient.
        temperature: tau of the distillation.

    Returns:
        (cross entropy in nats, tau^2 KL(softmax(teacher / tau) || softmax(student / tau)) in nats; 0 without a
        teacher), two 0-d tensors.

    Raises:
        MixheadError: where teacher and student do not have logits of one shape.
    """
    if teacher_logits_BTV is not None and teacher_logits_BTV.shape != logits_BTV.shape:
        raise MixheadError(
            f"The teacher's logits have the shape {list(teacher_logits_BTV.shape)}, the student's "
            f"{list(logits_BTV.shape)}: distillation needs two models with one vocabulary."
        )
    targets_R = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
    teacher_RV = None if teacher_logits_BTV is None else teacher_logits_BTV.detach().flatten(0, 1)
    cross_entropy, divergence = _NextTokenLosses.apply(logits_BTV.flatten(0, 1), targets_R, teacher_RV, temperature)
    return cross_entropy / num_targets, divergence / num_targets


class _NextTokenLosses(torch.autograd.Function):
    """Sums over the rows; the backward pass computes the probabilities again instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, targets_R: Tensor, teacher_RV: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        cross_entropy = logits_RV.new_zeros((), dtype=torch.float64 if logits_RV.device.type != "mps" else dtype)
        divergence = cross_entropy.clone()
        for rows in _chunks(logits_RV):
            targets_r = targets_R[rows]
            valid_r = targets_r != IGNORED
            student_rV = logits_RV[rows].to(dtype)
            log_student_rV = student_rV.log_softmax(1)
            nll_r = -log_student_rV.gather(1, targets_r.clamp(min=0).unsqueeze(1)).squeeze(1)
            cross_entropy += torch.where(valid_r, nll_r, 0.0).sum()
            if teacher_RV is not None:
                log_teacher_rV = softened(teacher_RV[rows].to(dtype), temperature).log_softmax(1)
                if temperature != 1.0:
                    log_student_rV = softened(student_rV, temperature).log_softmax(1)
                log_ratio_rV = log_teacher_rV - log_student_rV
                kl_r = torch.linalg.vecdot(log_teacher_rV.exp_(), log_ratio_rV)
                divergence += torch.where(valid_r, kl_r, 0.0).sum()
        ctx.save_for_backward(logits_RV, targets_R, teacher_RV)
        ctx.temperature = temperature
        return cross_entropy.to(dtype), (temperature**2 * divergence).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_cross_entropy: Tensor, grad_divergence: Tensor
    ) -> tuple[Tensor | None, None, None, None]:
        logits_RV, targets_R, teacher_RV = ctx.saved_tensors
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        temperature: float = ctx.temperature
        grad_RV = torch.empty_like(logits_RV)
        for rows in _chunks(logits_RV):
            targets_r1 = targets_R[rows].unsqueeze(1)
            student_rV = logits_RV[rows].to(dtype)
            grad_rV = student_rV.softmax(1)
            if teacher_RV is None:
                grad_rV.mul_(grad_cross_entropy)
            else:
                # tau^2 of the loss times 1 / tau of the inner derivative
                grad_kl = temperature * grad_divergence
                teacher_rV = softened(teacher_RV[rows].to(dtype), temperature).softmax(1)
                if temperature == 1.0:
                    grad_rV.mul_(grad_cross_entropy + grad_kl).sub_(teacher_rV.mul_(grad_kl))
                else:
                    soft_rV = softened(student_rV, temperature).softmax(1)
                    grad_rV.mul_(grad_cross_entropy).add_(soft_rV.sub_(teacher_rV).mul_(grad_kl))
            grad_rV.scatter_add_(1, targets_r1.clamp(min=0), -grad_cross_entropy.expand_as(targets_r1).to(dtype))
            # A replaced, not a multiplied gradient: a row that is no target may hold infinity.
            grad_RV[rows] = grad_rV.masked_fill_(targets_r1 == IGNORED, 0.0)
        return grad_RV, None, None, None


def softened(logits_rV: Tensor, temperature: float) -> Tensor:
    """The logits over the temperature."""
    return logits_rV if temperature == 1.0 else logits_rV / temperature


def _chunks(logits_RV: Tensor) -> list[slice]:
    """Runs of rows of which one fits the budget."""
    rows, vocabulary = logits_RV.shape
    step = max(_CHUNK_NUMBERS // vocabulary, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
