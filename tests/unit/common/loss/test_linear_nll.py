"""The loss from hidden states: that of torch from all logits at once, with its gradient, whatever the chunk."""

import pytest
import torch
from torch.nn import functional

from common.loss.linear_nll import linear_nll


def _drawn(num_tokens=37, hidden=24, words=101):
    torch.manual_seed(0)
    weight, bias = torch.randn(words, hidden, dtype=torch.float64), torch.randn(words, dtype=torch.float64)
    return torch.randn(num_tokens, hidden, dtype=torch.float64), weight, bias, torch.randint(words, (num_tokens,))


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradient_are_those_of_cross_entropy(chunk, with_bias):
    hidden, weight, bias, targets = _drawn()
    bias = bias if with_bias else None
    share = torch.linspace(0.5, 2, len(targets), dtype=torch.float64)  # each token counts by itself, as under DPO
    ours, theirs = (hidden.clone().requires_grad_() for _ in "ab")
    nll = linear_nll(ours, weight, targets, bias_v=bias, chunk=chunk)
    expected = functional.cross_entropy(functional.linear(theirs, weight, bias), targets, reduction="none")
    (nll * share).sum().backward()
    (expected * share).sum().backward()
    assert torch.allclose(nll.double(), expected, atol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


def test_a_head_that_is_trained_is_refused():
    hidden, weight, _, targets = _drawn()
    with pytest.raises(ValueError, match="head"):
        linear_nll(hidden, weight.requires_grad_(), targets)


def test_no_tokens_give_no_losses():
    hidden, weight, _, targets = _drawn()
    assert linear_nll(hidden[:0], weight, targets[:0]).shape == (0,)
