"""Negative log-likelihood from hidden states, without ever holding the logits of more than a few tokens.

    nll_n = logsumexp(W h_n) - (W h_n)[target_n],    d nll_n / d h_n = W^T (softmax(W h_n) - e_target_n)

The head W is frozen, so the gradient by h is all that is needed, and it is taken while the logits are there: nothing is
computed twice, and V values are held for `CHUNK` tokens in the place of N. Source of the idea: Hsu et al. 2024,
arXiv:2410.10989, section 3.2; theirs sums the loss inside, which cannot serve losses that weigh each row by itself.

N tokens with a target, H hidden width, V words.
"""

from typing import Any, Final

import torch
from torch import Tensor

CHUNK: Final = 1024  # tokens; half a gigabyte of float32 logits at 128k words


class _LinearNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_nh: Tensor, weight_vh: Tensor, bias_v: Tensor | None, targets_n: Tensor, chunk: int
    ) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        nll_n = torch.empty(len(hidden_nh), dtype=torch.float32, device=hidden_nh.device)
        grad_nh = torch.empty_like(hidden_nh) if wants_grad else None
        for start in range(0, len(hidden_nh), chunk):
            part = slice(start, start + chunk)
            logits_cv = torch.nn.functional.linear(hidden_nh[part], weight_vh, bias_v).float()
            target_c1 = targets_n[part, None]
            lse_c1 = torch.logsumexp(logits_cv, 1, keepdim=True)
            nll_n[part] = (lse_c1 - logits_cv.gather(1, target_c1))[:, 0]
            if grad_nh is not None:
                p_cv = logits_cv.sub_(lse_c1).exp_()
                p_cv.scatter_add_(1, target_c1, p_cv.new_full(target_c1.shape, -1.0))
                torch.mm(p_cv.to(hidden_nh.dtype), weight_vh, out=grad_nh[part])
        ctx.grad_nh = grad_nh
        return nll_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_nh = ctx.grad_nh
        return grads[0][:, None].to(grad_nh.dtype) * grad_nh, None, None, None, None


def linear_nll(
    hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor, *, bias_v: Tensor | None = None, chunk: int = CHUNK
) -> Tensor:
    """Negative log-likelihood of each target, nats, with gradients by the hidden states alone.

    Args:
        hidden_nh: What the head reads, at the positions before the targets.
        weight_vh: The head's weight, frozen, of the same type.
        targets_n: Token ids, int64.
        bias_v: The head's bias, frozen.
        chunk: Tokens whose logits are held at once.

    Shape: (N,), float32. A token's value and gradient depend on no other token, but for how a product of another size
    is rounded.

    Raises:
        ValueError: The head is trained; its gradient is not taken here.
    """
    if weight_vh.requires_grad or (bias_v is not None and bias_v.requires_grad):
        raise ValueError("linear_nll takes no gradient by the head's weight")
    return _LinearNll.apply(hidden_nh, weight_vh, bias_v, targets_n, chunk)  # type: ignore[no-any-return, no-untyped-call]
