"""Several adapters of one base as one: arithmetic on their products B A, never on A and B apart.

The mean of B and the mean of A do not multiply to the mean of B A; peft's `linear`, `ties` and `dare_*` on factors
are that approximation. Here linear and slerp are exact, as sums of products are products of what is put side by side:
w1 B1 A1 + w2 B2 A2 = [w1 B1, w2 B2] [A1; A2]. TIES and DARE act on each value of a product (peft's own functions, as
its `ties_svd` and `dare_*_svd`), and what comes out has full rank; it is cut to the nearest one of the rank asked for.

d and k: output and input width of a module, r: rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from peft.utils import merge_utils
from torch import Tensor
from torch.nn.functional import pad

from common.adapter.adapter import Tensors
from common.errors import ConfigError, ModelError
from server.aggregate import factored
from server.export import canonical

How = Literal["linear", "svd", "ties", "dare_ties", "dare_linear", "slerp"]
HOWS: Final = get_args(How)
DENSE: Final = frozenset({"ties", "dare_ties", "dare_linear"})
PARALLEL: Final = 0.9995  # cosine above which slerp is the straight line, which it then equals to 1e-4
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How adapters are put together.

    Attributes:
        weights: One for each adapter, in their order.
        rank: Of the result before it is padded to a listed one; 0: the inputs' largest (linear and slerp: exact).
        density: Share of values that TIES keeps and DARE does not drop.
    """

    how: How
    weights: tuple[float, ...]
    rank: int = 0
    density: float = 0.0
    seed: int = 0


def check(recipe: Recipe, num_adapters: int) -> None:
    """Refuse a recipe that means nothing.

    Raises:
        ConfigError: Names the option.
    """
    how, weights = recipe.how, recipe.weights
    if how not in HOWS:
        raise ConfigError(f"--how {how}: is none of {', '.join(HOWS)}")
    if num_adapters < 2:
        raise ConfigError("merge needs two folders or more; to export one, use export")
    if len(weights) != num_adapters or not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"--weights: give {num_adapters} finite numbers with commas, one for each folder")
    if not any(weights):
        raise ConfigError("--weights: all are zero, and so would be the result")
    if how == "slerp" and (num_adapters != 2 or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
        raise ConfigError(
            "--how slerp goes from one adapter to one other: give two folders and --weights 1-t,t of 0 to 1"
        )
    if (how in DENSE) != bool(recipe.density) or not 0 <= recipe.density <= 1:
        raise ConfigError(f"--density, above 0 and up to 1, is for {', '.join(sorted(DENSE))} and needed there")
    if recipe.seed and not how.startswith("dare"):
        raise ConfigError(f"--seed is for DARE, which drops values at random; --how {how} does not")
    if recipe.rank < 0 or (how in {"linear", "slerp"} and recipe.rank):
        raise ConfigError(f"--rank: --how {how} is exact at the sum of the ranks; to cut it, use --how svd")


def merge(adapters: Sequence[Tensors], recipe: Recipe) -> tuple[dict[str, Tensor], float]:
    """Put canonical adapters together.

    A module that an adapter does not touch counts as zero there.

    Args:
        adapters: At least two, of one base.

    Returns:
        The canonical result, and how much was lost in cutting to its rank: Frobenius norm of what was cut over that of
        the whole, over all modules; 0 for linear and slerp.

    Raises:
        ConfigError: The recipe means nothing.
        ModelError: Two adapters have different shapes in one module.

    Source: TIES: Yadav et al. 2023, arXiv:2306.01708, with the sign elected before weights are applied, as peft does.
    DARE: Yu et al. 2023, arXiv:2311.03099. SLERP: Shoemake 1985, "Animating rotation with quaternion curves", on the
    flattened products. Cut: Eckart and Young 1936.
    """
    check(recipe, len(adapters))
    modules = [factored.modules(tensors) for tensors in adapters]
    rank = recipe.rank or max(canonical.rank_of(tensors) for tensors in adapters)
    merged: dict[str, Pair] = {}
    lost, whole = 0.0, 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for name in sorted(set().union(*modules)):
            b_dr, a_rk = next(pairs[name] for pairs in modules if name in pairs)
            absent = (torch.zeros(b_dr.shape[0], 1), torch.zeros(1, a_rk.shape[1]))
            pairs = [pairs_of.get(name, absent) for pairs_of in modules]
            if any(b.shape[0] != b_dr.shape[0] or a.shape[1] != a_rk.shape[1] for b, a in pairs):
                raise ModelError(f"the adapters have different shapes in {name}; merge adapters of one base")
            merged[name], (cut, size) = _merge_module(pairs, recipe, rank)
            lost, whole = lost + cut**2, whole + size**2
    listed = canonical.listed_rank(max(a_rk.shape[0] for _, a_rk in merged.values()))
    padded: dict[str, Tensor] = {}
    for name, (b_dr, a_rk) in merged.items():
        missing = listed - a_rk.shape[0]
        padded |= factored.named(name, pad(b_dr, (0, missing)), pad(a_rk, (0, 0, 0, missing)))
    return padded, math.sqrt(lost / whole) if whole else 0.0


def _merge_module(pairs: Sequence[Pair], recipe: Recipe, rank: int) -> tuple[Pair, tuple[float, float]]:
    """One module's result, and the norms of what was cut and of the whole."""
    if recipe.how in DENSE:
        act: Callable[..., Tensor] = getattr(merge_utils, recipe.how)
        density = min(recipe.density, 1 - 1e-12)  # at 1 peft warns that nothing is dropped
        whole_dk = act([b_dr @ a_rk for b_dr, a_rk in pairs], torch.tensor(recipe.weights), density)
        u_dr, s_r, vh_rk = torch.linalg.svd(whole_dk, full_matrices=False)
        nearest = (u_dr[:, :rank] * s_r[:rank], vh_rk[:rank])
        return nearest, (float(s_r[rank:].double().norm()), float(s_r.double().norm()))
    weights = slerp_weights(pairs, recipe.weights[1]) if recipe.how == "slerp" else recipe.weights
    left = torch.cat([weight * b_dr for weight, (b_dr, _) in zip(weights, pairs, strict=True)], dim=1)
    right = torch.cat([a_rk for _, a_rk in pairs])
    if recipe.how != "svd":
        return (left, right), (0.0, 1.0)
    thin = factored.truncate(left, right, rank=rank)
    rest = torch.cat([left, -thin[0]], dim=1), torch.cat([right, thin[1]])
    return thin, (factored.norm(*rest), factored.norm(left, right))


def slerp_weights(pairs: Sequence[Pair], t: float) -> tuple[float, float]:
    """Factors of two products on the great circle between them: sin((1 - t) w) / sin w and sin(t w) / sin w.

    cos w is the products' inner product over their norms. Where they are parallel, or one is zero: 1 - t and t.

    Example:
        >>> east, north = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
        >>> [round(factor, 4) for factor in slerp_weights([(east, torch.ones(1, 1)), (north, torch.ones(1, 1))], 0.5)]
        [0.7071, 0.7071]
    """
    (b1, a1), (b2, a2) = [(b_dr.double(), a_rk.double()) for b_dr, a_rk in pairs]
    inner = float(((b1.T @ b2) * (a1 @ a2.T)).sum())
    size = factored.norm(b1, a1) * factored.norm(b2, a2)
    cosine = inner / size if size else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
