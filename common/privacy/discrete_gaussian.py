"""Whole numbers with the probabilities of a discrete Gaussian, exact: no rounding of logarithms is in any of them.

    P(Y = y) is proportional to exp(-y^2 / (2 v)),  y a whole number

Source of the distribution and its promise: Canonne, Kamath and Steinke 2020, arXiv:2004.00010. Their sampler draws a
discrete Laplace value and rejects; this one draws a block of whole numbers by Walker's alias method and rejects within
it, which takes one try in place of several and no branch, so that it runs on vectors. The accepted value has exactly
the probabilities above: blocks are drawn by whole-number weights that lie above the density, and a try is accepted by
comparing an unending random binary fraction with the ratio of density to weight. Floating-point numbers decide where
they cannot be wrong; where they could, in one of 10^12 tries, decimal numbers of as many digits as needed do.

J tries, B blocks.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Final

import torch
from torch import Tensor

EXTRA_VARIANCE: Final = 16  # see `variance`
BYTES_PER_TRY: Final = 16
CHUNK: Final = {"cpu": 1 << 15, "cuda": 1 << 20}  # tries at once: what fits a cache; what keeps a GPU busy
NUM_BLOCKS: Final = 2048
MAX_STD: Final = 2.0**46
_COLUMN_BITS, _COIN_BITS, _LOW_BITS, _HIGH_BITS = 11, 32, 20, 24
_COINS: Final = 1 << _COIN_BITS
_FRACTIONS: Final = 1 << (_LOW_BITS + _HIGH_BITS)
_MARGIN: Final = 32.0  # of so many fractions; float64 errs by less than 8 of them
_MORE_BITS: Final = 256


def variance(std: float) -> Fraction:
    """The parameter v of noise that hides at least as much as a normal value of standard deviation `std`.

    v = std^2 + 16. A normal value of variance std^2 that is rounded at random, to each whole number y with probability
    proportional to exp(-(y - x)^2 / 32), has the probabilities of a discrete Gaussian of variance std^2 + 16 but for a
    factor within 1 +- 10^-136. So this noise on whole numbers tells no more than normal noise followed by a rounding
    that anybody could do, in one step and in many, for vectors of any length, sampled or not.

    Source: Peikert 2010, "An efficient and parallel Gaussian sampler for lattices", theorem 3.1.
    """
    return Fraction(std) ** 2 + EXTRA_VARIANCE


def num_tries(size: int) -> int:
    """Tries that are drawn at once for so many values; more are drawn if they do not do."""
    return size + size // 64 + 64


def sample(read: Callable[[int], Tensor], size: int, *, std: float, device: torch.device) -> Tensor:
    """Independent values of a discrete Gaussian of variance `variance(std)`.

    Args:
        read: Gives so many random bytes, uint8 on the host, valid until it is asked again.
        size: Number of values.
        std: Standard deviation that the noise must match, in steps of the grid; 0 to `MAX_STD`.
        device: Where the values are made; the same on every device.

    Returns:
        Whole numbers, (size,), float64 on `device`, all exact.

    Raises:
        ValueError: `std` is out of range.

    Privacy: values beyond 16 standard deviations, of probability below 10^-55, are never drawn.
    """
    if not 0 <= std <= MAX_STD:
        raise ValueError(f"noise of {std} grid steps cannot be drawn; the most is {MAX_STD}")
    table = _table(std)
    found: list[Tensor] = []
    missing = size
    while missing > 0:
        words_j2 = read(BYTES_PER_TRY * num_tries(missing)).view(torch.int64).view(-1, 2)
        step = CHUNK.get(device.type, CHUNK["cpu"])
        for start in range(0, len(words_j2), step):
            if missing <= 0:
                break
            tried = _tries(words_j2[start : start + step].to(device), table)
            unsure = tried.is_unsure_j.nonzero().flatten().tolist()
            if unsure:
                words_j2 = words_j2.clone()  # what was read is overwritten by what is read next
                for place in unsure:
                    tried.is_kept_j[place] = tried.is_exactly_kept(place, table, read)
            values = tried.value_j[tried.is_kept_j][:missing]
            found.append(values)
            missing -= len(values)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class _Table:
    """Blocks of equal width from 0 upwards; a block's weight is above `scale` times the density in it.

    `coin_b` and `alias_b` are Walker's: column b stays b below its coin, and becomes its alias otherwise.
    """

    variance: Fraction
    width: int
    scale: int
    weights: tuple[int, ...]
    coin_b: Tensor
    alias_b: Tensor
    ratio_b: Tensor


@functools.lru_cache(maxsize=8)
def _table(std: float) -> _Table:
    """Weights whose sum is a power of two, so that an alias is drawn exactly by bits."""
    v = variance(std)
    width = 1 << max(0, math.floor(math.log2(math.sqrt(v) / 64)))
    total = NUM_BLOCKS * _COINS
    densities = [math.exp(-float(Fraction((block * width) ** 2) / (2 * v))) for block in range(NUM_BLOCKS)]
    scale = int((total - 2 * NUM_BLOCKS) / math.fsum(densities) * (1 - 2.0**-36))
    weights = [int(scale * density * (1 + 2.0**-38)) + 1 for density in densities]
    spare = total - sum(weights)
    if spare < 0:
        raise ValueError("the weights of the blocks do not fit")
    weights[0] += spare
    coins, aliases = _walker(weights)
    ratios = [scale * density / weight for density, weight in zip(densities, weights, strict=True)]
    return _Table(
        v,
        width,
        scale,
        tuple(weights),
        torch.tensor(coins),
        torch.tensor(aliases),
        torch.tensor(ratios, dtype=torch.float64),
    )


def _walker(weights: list[int]) -> tuple[list[int], list[int]]:
    """Coins and aliases of columns that hold `_COINS` each. Source: Walker 1977; Vose 1991."""
    left, coins, aliases = list(weights), [_COINS] * len(weights), list(range(len(weights)))
    small = [block for block, weight in enumerate(left) if weight < _COINS]
    large = [block for block, weight in enumerate(left) if weight >= _COINS]
    while small:
        low, high = small.pop(), large[-1]
        coins[low], aliases[low] = left[low], high
        left[high] -= _COINS - left[low]
        if left[high] < _COINS:
            small.append(large.pop())
    return coins, aliases


@dataclass(frozen=True)
class _Tried:
    """What tries came to; `fraction_j` are the bits known of the random fraction."""

    value_j: Tensor
    is_kept_j: Tensor
    is_unsure_j: Tensor
    block_j: Tensor
    fraction_j: Tensor

    def is_exactly_kept(self, place: int, table: _Table, read: Callable[[int], Tensor]) -> bool:
        """Go on with the random fraction until it differs from the ratio of density to weight."""
        block, value = int(self.block_j[place]), int(self.value_j[place])
        fraction, num_bits = int(self.fraction_j[place]), _LOW_BITS + _HIGH_BITS
        while True:
            fraction = fraction << _MORE_BITS | int.from_bytes(bytes(read(_MORE_BITS // 8).numpy()), "little")
            num_bits += _MORE_BITS
            with localcontext() as context:
                context.prec = num_bits
                power = Fraction(value**2) / (2 * table.variance)
                ratio = (-Decimal(power.numerator) / Decimal(power.denominator)).exp() * table.scale
                bound = ratio / table.weights[block] * (1 << num_bits)
                if abs(bound - fraction) > 2:
                    return bound > fraction


def _tries(words_j2: Tensor, table: _Table) -> _Tried:
    """Two words a try: 11 bits of column, 32 of coin, 1 of sign, 44 of fraction, and the place within the block."""
    first_j, second_j = words_j2[:, 0], words_j2[:, 1]
    coin_b, alias_b, ratio_b = (part.to(words_j2.device) for part in (table.coin_b, table.alias_b, table.ratio_b))
    column_j = first_j & (NUM_BLOCKS - 1)
    coin_j = first_j >> _COLUMN_BITS & (_COINS - 1)
    block_j = torch.where(coin_j < coin_b[column_j], column_j, alias_b[column_j])
    is_negative_j = (first_j >> (_COLUMN_BITS + _COIN_BITS) & 1).bool()
    width = table.width
    high_j = second_j >> (width.bit_length() - 1) & ((1 << _HIGH_BITS) - 1)
    low_j = first_j >> (_COLUMN_BITS + _COIN_BITS + 1) & ((1 << _LOW_BITS) - 1)
    fraction_j = high_j << _LOW_BITS | low_j
    edge_j, beyond_j = block_j * width, second_j & (width - 1)
    beyond = beyond_j.double()
    exponent_j = edge_j.double().mul_(2).add_(beyond).mul_(beyond).mul_(-0.5 / float(table.variance))
    bound_j = exponent_j.exp_().mul_(ratio_b[block_j]).mul_(_FRACTIONS)
    over_j = bound_j.sub_(fraction_j.double())
    is_possible_j = ~(is_negative_j & (edge_j + beyond_j == 0))  # 0 has one sign
    is_kept_j = (over_j >= 1 + _MARGIN) & is_possible_j
    is_unsure_j = (over_j > -_MARGIN) & ~is_kept_j & is_possible_j
    value_j = (edge_j + beyond_j).double()
    return _Tried(torch.where(is_negative_j, -value_j, value_j), is_kept_j, is_unsure_j, block_j, fraction_j)
