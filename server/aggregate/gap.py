"""The aggregation gap: how far the mean of the factors is from the mean of the products, never forming a d x k matrix.

    M - B_mean A_mean = sum_i p_i (B_i - B_mean)(A_i - A_mean)
    gap = || M - B_mean A_mean ||_F / || M - B_prev A_prev ||_F,   M = sum_i p_i B_i A_i

d and k: output and input width of a module, r: rank, m: columns kept.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from common import ranks
from server.aggregate import factored

RANK_FACTOR: Final = 16
ROUNDING: Final = 1e-6  # of a module's norm; several units in the last place of float32


@dataclass
class RunningProduct:
    """sum_i w_i B_i A_i as a pair of thin matrices.

    Exact while the stacked rank is at most `max_rank`; beyond, the smallest directions are cut by a factored SVD, so
    that memory does not grow with the number of sites.

    Attributes:
        max_rank: Columns kept at most.
        left_dm: d x m.
        right_mk: m x k.
    """

    max_rank: int
    left_dm: Tensor
    right_mk: Tensor

    def add(self, b_dr: Tensor, a_rk: Tensor, *, weight: float) -> None:
        """Add one site's product."""
        self.left_dm = torch.cat([self.left_dm, weight * b_dr], dim=1)
        self.right_mk = torch.cat([self.right_mk, a_rk], dim=0)
        if self.left_dm.shape[1] > self.max_rank:
            self.left_dm, self.right_mk = factored.truncate(self.left_dm, self.right_mk, rank=self.max_rank // 2)


@dataclass
class GapMeter:
    """Watches a round's uploads and tells the gap at its end.

    Attributes:
        before: The global adapter that the round began with.
    """

    before: Mapping[str, Tensor]
    _products: dict[str, RunningProduct] = field(default_factory=dict)
    _total: float = 0.0

    def add(self, change: Mapping[str, Tensor], *, weight: float) -> None:
        """Take one site's change to the global adapter."""
        self._total += weight
        local = {name: tensor + change[name] for name, tensor in ranks.cut(self.before, change).items()}
        for name, (b_dr, a_rk) in factored.modules(local).items():
            product = self._products.setdefault(name, _empty(b_dr, a_rk))
            product.add(b_dr, a_rk, weight=weight)

    def per_module(self, after: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Norm of the bias and norm of the ideal step, by module.

        Args:
            after: The new global adapter.
        """
        old, new = factored.modules(self.before), factored.modules(after)
        return {name: self._norms(product, old[name], new[name]) for name, product in self._products.items()}

    def _norms(
        self, product: RunningProduct, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
    ) -> tuple[float, float]:
        """|| M - B_mean A_mean || and || M - B_prev A_prev || of one module; what float32 cannot tell from 0 is 0."""
        return _distances((product.left_dm / self._total, product.right_mk), old, new)


def of_products(
    before: Mapping[str, Tensor], mean: Mapping[str, tuple[Tensor, Tensor]], after: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """The same two norms where the mean of the products is at hand: what a cut to some rank has lost of the step.

    Args:
        before: The global adapter that the round began with.
        mean: Of the products of each module.
        after: The new global adapter.
    """
    old, new, beside = factored.modules(before), factored.effective(after), factored.side(before)
    norms = {}
    for name, (left_dm, right_mk) in mean.items():
        u_dm, v_mk = beside.get(name, (left_dm[:, :0], right_mk[:0]))
        ideal = torch.cat([left_dm, u_dm], dim=1), torch.cat([right_mk, v_mk])
        bias, step = _apart(ideal, new[name]), _apart((left_dm, right_mk), old[name])  # the old side is in both
        norms[name] = _told(bias, step, new[name])
    return norms


def _distances(
    ideal: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """|| ideal - new || and || ideal - old ||; what float32 cannot tell from 0 is 0."""
    return _told(_apart(ideal, new), _apart(ideal, old), new)


def _apart(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Distance of two products."""
    return factored.norm(torch.cat([one[0], -other[0]], dim=1), torch.cat([one[1], other[1]]))


def _told(bias: float, step: float, new: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Both norms, 0 where they are below float32's rounding of the new product."""
    smallest = ROUNDING * factored.norm(*new)
    return bias if bias > smallest else 0.0, step if step > smallest else 0.0


def whole(norms: Iterable[tuple[float, float]]) -> float:
    """The gap over all modules together; 0 if nothing moved."""
    pairs = list(norms)
    ideal = sum(step**2 for _, step in pairs) ** 0.5
    return sum(bias**2 for bias, _ in pairs) ** 0.5 / ideal if ideal else 0.0


def _empty(b_dr: Tensor, a_rk: Tensor) -> RunningProduct:
    """A sum of no products, of a module's shape."""
    return RunningProduct(RANK_FACTOR * a_rk.shape[0], b_dr[:, :0], a_rk[:0])
