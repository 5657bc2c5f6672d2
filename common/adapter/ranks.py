"""The rank of each site's adapter, where sites have different ones; both ends derive it from the run alone.

A site of rank q holds the first q rows of A and columns of B. The scale of the product is the run's at every rank.
Loads no torch.

d and k: output and input width of a module, r: rank of the global adapter, q: that of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from common.frame.records import TensorSpec
from common.run.trainable import factor_of

if TYPE_CHECKING:
    from torch import Tensor

    from common.run.schema.model import AdapterConfig


def of_site(settings: AdapterConfig, site: str) -> int:
    """The rank of a site's adapter.

    Args:
        settings: Section `[adapter]` of the run.
        site: Its name; one that `adapter.site_ranks` does not name has `adapter.r`.
    """
    return settings.site_ranks.get(site, settings.r)


def specs_of(settings: AdapterConfig, tensor_specs: Sequence[TensorSpec], site: str) -> tuple[TensorSpec, ...]:
    """Names and shapes of the adapter at a site; a side adapter is the same everywhere."""
    return at_rank(tensor_specs, of_site(settings, site))


def at_rank(tensor_specs: Sequence[TensorSpec], rank: int) -> tuple[TensorSpec, ...]:
    """The factors at another rank.

    Example:
        >>> [spec.shape for spec in at_rank([TensorSpec("q.lora_A.weight", (8, 64))], 2)]
        [(2, 64)]
    """
    return tuple(TensorSpec(spec.name, _shape(spec, rank)) for spec in tensor_specs)


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


def _shape(spec: TensorSpec, rank: int) -> tuple[int, ...]:
    """The shape of a factor at another rank; of a tensor that is no factor, its own."""
    factor = factor_of(spec.name)
    return (rank, *spec.shape[1:]) if factor == "A" else (*spec.shape[:-1], rank) if factor == "B" else spec.shape


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """By name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
