"""Adapters of another rank: a site of rank q holds the first q rows of A and columns of B. Loads no torch.

The scale of the product is the run's at every rank.

d and k: output and input width of a module, r: rank of the global adapter, q: that of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from common.frame.records import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


def cut(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor] | Sequence[TensorSpec]) -> dict[str, Tensor]:
    """The first rows and columns of tensors, as many as others of the same names have; the rest is left out."""
    shapes = {spec.name: spec.shape for spec in like} if isinstance(like, Sequence) else _shapes(like)
    return {name: tensors[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}


def padded(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with zeros after their last row and column, up to the shape of others of the same names."""
    return {name: _padded(tensor, like[name]) for name, tensor in tensors.items()}


def _padded(tensor: Tensor, like: Tensor) -> Tensor:
    """One tensor; itself where nothing is missing."""
    if tensor.shape == like.shape:
        return tensor
    whole = tensor.new_zeros(like.shape)
    whole[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """By name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
