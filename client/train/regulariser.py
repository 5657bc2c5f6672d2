"""What AdaLoRA adds to its loss, so that its factors stay near those of an SVD. r rank, k inputs, d outputs."""

from typing import Final

import torch
from torch import Tensor, nn

from common.adapter import adapter

WEIGHT: Final = 0.5  # peft's default, `orth_reg_weight`


def add_gradient(model: nn.Module) -> None:
    """Add the gradient of the mean of || Q Q^T - I ||_F and || P^T P - I ||_F; nothing for other kinds.

    It depends on no row, so that neither clipping nor noise has to see it.

    Source: Zhang et al. 2023, arXiv:2303.10512, equation 4; norms and weight as peft 0.21 has them.
    """
    own = adapter.parameters(model)
    grams = [_gram(name, parameter) for name, parameter in own.items() if name.endswith((".lora_A", ".lora_B"))]
    if grams:
        terms = [(gram_rr - torch.eye(len(gram_rr), device=gram_rr.device)).norm() for gram_rr in grams]
        (WEIGHT * torch.stack(terms).mean()).backward()  # type: ignore[no-untyped-call]


def _gram(name: str, factor: Tensor) -> Tensor:
    """Inner products of the r directions of one factor; Q is (r, k), P is (d, r)."""
    return factor @ factor.T if name.endswith(".lora_A") else factor.T @ factor
