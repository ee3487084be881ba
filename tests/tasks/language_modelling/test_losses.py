import pytest
import torch
import torch.nn.functional as F

from mixhead import MixheadError
from mixhead.tasks.language_modelling.losses import next_token_losses

VOCABULARY, WINDOW = 61, 12


def windows(count):
    return torch.randint(0, VOCABULARY, (count, WINDOW))


def naive_losses(logits, labels, items, teacher, tau):
    student, teacher = logits[:, :-1].float(), teacher[:, :-1].float()
    real = (labels[:, 1:] != -100).float()
    nll = F.cross_entropy(student.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    p, q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    return nll.sum() / items, tau**2 * (kl * real).sum() / items


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chunked_losses_equal_the_naive_ones(monkeypatch, tau, dtype):
    monkeypatch.setattr("mixhead.tasks.language_modelling.losses._CHUNK_NUMBERS", 5 * VOCABULARY)
    logits = torch.randn(3, WINDOW, VOCABULARY, dtype=dtype).mul_(3).requires_grad_()
    teacher = torch.randn(3, WINDOW, VOCABULARY, dtype=dtype) * 3
    labels = windows(3).clone()
    labels[1, 4:9] = -100
    found = next_token_losses(logits, labels, 100, teacher, tau)
    expected = naive_losses(logits, labels, 100, teacher, tau)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6)
    (0.3 * found[0] + 0.7 * found[1]).backward()
    gradient, logits.grad = logits.grad, None
    (0.3 * expected[0] + 0.7 * expected[1]).backward()
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)


def test_infinite_logits_at_positions_without_target_give_no_nan():
    logits = torch.randn(1, 4, 7).index_fill_(1, torch.tensor([3]), torch.inf).requires_grad_()
    loss, _ = next_token_losses(logits, torch.tensor([[1, 2, 3, 4]]), 3)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_distillation_refuses_another_vocabulary():
    with pytest.raises(MixheadError, match="vocabulary"):
        next_token_losses(torch.randn(1, 3, 5), torch.ones(1, 3, dtype=torch.int64), 2, torch.randn(1, 3, 6))
