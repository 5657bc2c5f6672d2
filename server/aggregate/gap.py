"""The aggregation gap: how far the mean of the factors is from the mean of the products, never forming a d x k matrix.

    M - B_mean A_mean = sum_i p_i (B_i - B_mean)(A_i - A_mean)
    gap = || M - B_mean A_mean ||_F / || M - B_prev A_prev ||_F,   M = sum_i p_i B_i A_i

The exact norm of a sum of K products needs all pairs of sites, which is quadratic in K, or all their factors at the
end. So the sum is kept as a sketch of t x s values a module, and its norms are estimates:

    Y = S M W^T,   S (t x d) and W (s x k) with one entry of +-1 in column j, in row j mod t or j mod s
    E || Y ||_F^2 = || M ||_F^2,   Var || Y ||_F^2 <= 2 E (sum_rows || y_r ||^4 + sum_columns || y_c ||^4)

since rows (columns) that meet in a bucket have independent signs, and what a bucket holds has a variance of at most
twice its squared energy. The right-hand side, without its mean, is what `Norms` tells. Signs, t and s are drawn anew
each round, so that rows which hold most of M rarely meet and no error stays. A side of at most `MAX_WIDTH` is not
folded; where neither is, the norms are exact.

Source: Charikar, Chen and Farach-Colton 2002 (count sketch); Clarkson and Woodruff 2013, arXiv:1207.6365, section 2.

d and k: output and input width of a module, q: rank of a site, t and s: rows and columns of a sketch, m: columns kept.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.aggregate import factored

MIN_WIDTH: Final = 97  # rows and columns of a sketch at least: the standard error of a module falls with their number
MAX_WIDTH: Final = 128
PLACES: Final = 1024  # where a module can begin to read in the sequence of signs
BATCH: Final = 4  # sites whose sketches are multiplied at once
ROUNDING: Final = 1e-6  # of a module's norm; several units in the last place of float32

Values = NDArray[np.float32]
Pair = tuple[Values, Values]  # of one module: S B (t x q) and A W^T (q x s)


class Norms(NamedTuple):
    """What a round's new adapter misses of one module, and how much of that is chance.

    Attributes:
        bias: Norm of what it misses.
        step: Norm of the ideal step.
        bias_error: Standard deviation of `bias` squared, at most, as the sketch itself shows it; 0 where it is exact.
        step_error: Of `step` squared.
    """

    bias: float
    step: float
    bias_error: float = 0.0
    step_error: float = 0.0


class Sketcher:
    """Both factors of a module in few values, by signs that depend on a seed, on the module and on nothing else.

    Args:
        shapes: d and k of every module, by name.
        seed: Of the signs. Every seed is another estimate.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._widths = (torch.randint(MIN_WIDTH, MAX_WIDTH + 1, (2,), generator=generator)).tolist()
        size = PLACES + MAX_WIDTH + max((max(shape) for shape in shapes.values()), default=0)
        signs = 1 - 2 * torch.randint(2, (2, size), generator=generator)
        self._signs: NDArray[np.float32] = signs.float().numpy()
        self._repeated: dict[int, Values] = {}
        places = torch.randperm(max(PLACES, len(shapes)), generator=generator).tolist()
        self._places = {name: place % PLACES for name, place in zip(sorted(shapes), places, strict=False)}
        self._buffer = torch.empty(0)

    def pair(self, name: str, b_dq: Tensor, a_qk: Tensor) -> Pair:
        """S B and A W^T of one module, float32."""
        return self._left(b_dq, self._places[name]), self._right(a_qk, self._places[name])

    def _left(self, b_dq: Tensor, place: int) -> Values:
        """Rows j of B with their signs, added up by j mod t."""
        (d, rank), rows = b_dq.shape, _width(b_dq.shape[0], self._widths[0])
        if rank not in self._repeated:
            self._repeated[rank] = np.repeat(self._signs[0], rank)
        num_blocks = -(-d // rows)
        values = self._whole(b_dq, (1, num_blocks * rows * rank)).reshape(num_blocks, rows * rank)
        signs = self._repeated[rank][place * rank :][: values.size].reshape(values.shape)
        left_tq: Values = np.einsum("bc,bc->c", values, signs).reshape(rows, rank)
        return left_tq

    def _right(self, a_qk: Tensor, place: int) -> Values:
        """Columns j of A with their signs, added up by j mod s."""
        (rank, k), columns = a_qk.shape, _width(a_qk.shape[1], self._widths[1])
        num_blocks = -(-k // columns)
        values = self._whole(a_qk, (rank, num_blocks * columns)).reshape(rank, num_blocks, columns)
        signs = self._signs[1][place:][: num_blocks * columns].reshape(num_blocks, columns)
        right_qs: Values = np.einsum("rbc,bc->rc", values, signs)
        return right_qs

    def _whole(self, factor: Tensor, shape: tuple[int, int]) -> Values:
        """A factor as rows in float32, zeros at their ends; in a buffer that the next one uses again."""
        num_rows, length = shape
        if self._buffer.numel() < num_rows * length:
            self._buffer = torch.empty(num_rows * length)
        rows = self._buffer[: num_rows * length].view(shape)
        given = factor.numel() // num_rows
        rows[:, :given].view(factor.shape).copy_(factor)
        rows[:, given:] = 0
        return rows.numpy()


class GapMeter:
    """Watches a round's uploads and tells the gap at its end; its memory does not grow with the number of sites.

    Args:
        before: The global adapter that the round began with.
        seed: Of the sketch's signs.
    """

    def __init__(self, before: Mapping[str, Tensor], *, seed: int) -> None:
        found = factored.modules(before)
        self._sketcher = Sketcher({name: (len(b), a.shape[1]) for name, (b, a) in found.items()}, seed=seed)
        self._before = {name: self._sketcher.pair(name, *pair) for name, pair in found.items()}
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._waiting: list[tuple[float, dict[str, Pair]]] = []
        self._total = 0.0

    def add(self, change: Mapping[str, Tensor], *, weight: float) -> None:
        """Take one site's change to the global adapter."""
        self._total += weight
        pairs = {name: self._sketcher.pair(name, *pair) for name, pair in factored.modules(change).items()}
        self._waiting.append((weight, pairs))
        if len(self._waiting) == BATCH:
            self._flush()

    def per_module(self, after: Mapping[str, Tensor]) -> dict[str, Norms]:
        """Norm of the bias and norm of the ideal step, by module; what float32 cannot tell from 0 is 0.

        Args:
            after: The new global adapter.
        """
        self._flush()
        new = factored.modules(after)
        found = {}
        for name, total in self._sums.items():
            ideal, old = total / self._total, _product(self._before[name])
            made = _product(self._sketcher.pair(name, *new[name]))
            bias, step = ideal - made, ideal - old
            shape = len(new[name][0]), new[name][1].shape[1]
            norms = _told(float(np.linalg.norm(bias)), float(np.linalg.norm(step)), float(np.linalg.norm(made)))
            found[name] = Norms(*norms, _error(bias, shape), _error(step, shape))
        return found

    def _flush(self) -> None:
        """Add the products of the sites that wait."""
        for name in self._waiting[0][1] if self._waiting else ():
            lefts, rights = [], []
            for weight, pairs in self._waiting:
                (left_tq, right_qs), (old_tr, old_rs) = pairs[name], self._before[name]
                lefts.append(weight * (left_tq + old_tr.astype(np.float64)))
                rights.append(right_qs + old_rs.astype(np.float64))
            product = np.concatenate(lefts, axis=1) @ np.concatenate(rights)
            self._sums[name] = self._sums[name] + product if name in self._sums else product
        self._waiting.clear()


def of_products(
    before: Mapping[str, Tensor], mean: Mapping[str, tuple[Tensor, Tensor]], after: Mapping[str, Tensor]
) -> dict[str, Norms]:
    """The same norms, exact, where the mean of the products is at hand: what a cut to some rank has lost of the step.

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
        norms[name] = Norms(*_told(bias, step, factored.norm(*new[name])))
    return norms


def _apart(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Distance of two products."""
    return factored.norm(torch.cat([one[0], -other[0]], dim=1), torch.cat([one[1], other[1]]))


def _told(bias: float, step: float, new: float) -> tuple[float, float]:
    """Both norms, 0 where they are below float32's rounding of the new product, whose norm is `new`."""
    return bias if bias > ROUNDING * new else 0.0, step if step > ROUNDING * new else 0.0


def whole(norms: Iterable[Norms]) -> float:
    """The gap over all modules together; 0 if nothing moved."""
    pairs = list(norms)
    ideal = sum(each.step**2 for each in pairs) ** 0.5
    return math.sqrt(sum(each.bias**2 for each in pairs)) / ideal if ideal else 0.0


def error(norms: Iterable[Norms]) -> float:
    """Standard deviation of `whole`, at most, by the first order of a ratio's error; 0 where it is exact.

    Modules read the signs from places of their own, so that the variances of their squares are added up.
    """
    pairs = list(norms)
    bias, step = sum(each.bias**2 for each in pairs), sum(each.step**2 for each in pairs)
    if not bias or not step:
        return 0.0
    of_bias = math.sqrt(sum(each.bias_error**2 for each in pairs)) / bias
    of_step = math.sqrt(sum(each.step_error**2 for each in pairs)) / step
    return whole(pairs) * (of_bias + of_step) / 2


def _width(size: int, drawn: int) -> int:
    """Rows or columns of a sketch of so many."""
    return size if size <= MAX_WIDTH else drawn


def _product(pair: Pair) -> NDArray[np.float64]:
    """Y = S B A W^T of one module, t x s."""
    return pair[0].astype(np.float64) @ pair[1].astype(np.float64)


def _error(sketch_ts: NDArray[np.float64], shape: tuple[int, int]) -> float:
    """Standard deviation of a sketch's squared norm, at most; a side that was not folded adds nothing to it."""
    variance = sum(
        2 * float((np.square(sketch_ts).sum(axis=1 - axis) ** 2).sum())
        for axis, size in enumerate(shape)
        if size > sketch_ts.shape[axis]
    )
    return math.sqrt(variance)
