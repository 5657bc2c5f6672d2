"""Products of thin matrices, factored: eigenvalues of small Gram matrices, never a d x k one.

d and k: output and input width of a module, m: columns of a pair, r: rank.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from common.adapter import cores

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
DEAD: Final = 1e-14  # of the largest eigenvalue of R R^T; float64 knows no direction of R below
SIDE_A_SUFFIX, SIDE_B_SUFFIX = ".residual_A.weight", ".residual_B.weight"


def modules(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The pair (B, A) of every module that an adapter touches, by the module's name.

    The effective change of the module's weight is `scale * B A`; a core between the two is part of A here.
    """
    names = [name.removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX)]
    found = cores.plain(tensors)
    return {name: (found[name + B_SUFFIX], found[name + A_SUFFIX]) for name in sorted(names)}


def side(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The pair (U, V) of the side adapter of every module; empty where there is none."""
    names = [name.removesuffix(SIDE_A_SUFFIX) for name in tensors if name.endswith(SIDE_A_SUFFIX)]
    return {name: (tensors[name + SIDE_B_SUFFIX], tensors[name + SIDE_A_SUFFIX]) for name in sorted(names)}


def effective(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """All that an adapter adds to each module, its side adapter included, as one pair of thin matrices."""
    beside = side(tensors)
    found = {}
    for name, (b_dr, a_rk) in modules(tensors).items():
        u_dm, v_mk = beside.get(name, (b_dr[:, :0], a_rk[:0]))
        found[name] = torch.cat([b_dr, u_dm], dim=1), torch.cat([a_rk, v_mk])
    return found


def cut_side(module: str, left_dm: Tensor, right_mk: Tensor, *, like: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A product as a module's side adapter, cut to the rank of the one that it has."""
    u_dr, v_rk = truncate(left_dm, right_mk, rank=like[1].shape[0])
    return {module + SIDE_A_SUFFIX: v_rk.to(torch.float32), module + SIDE_B_SUFFIX: u_dr.to(torch.float32)}


def named(module: str, b_dr: Tensor, a_rk: Tensor) -> dict[str, Tensor]:
    """A pair under its tensors' names, float32."""
    return {module + A_SUFFIX: a_rk.to(torch.float32), module + B_SUFFIX: b_dr.to(torch.float32)}


def norm(left_dm: Tensor, right_mk: Tensor) -> float:
    """Frobenius norm of a product, in float64: || L R ||^2 = <L^T L, R R^T>, exact to 1e-8 of || L || || R ||."""
    return float((_gram(left_dm.T) * _gram(right_mk)).sum().clamp_min(0.0).sqrt())


def svd(left_dm: Tensor, right_mk: Tensor, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest `rank` singular values of a product, descending, and their vectors: U (d x r), S (r), V^T (r x k).

    A product that has fewer gets zeros in S and U for the rest; V^T always has `rank` rows of length one,
    orthonormal as long as `rank` is at most k. Values are exact to 1e-7 of the largest.
    """
    scaled_dr, vh_rk = _split(left_dm, right_mk, rank=rank)
    s_r = torch.linalg.vector_norm(scaled_dr, dim=0)
    u_dr = torch.where(s_r > 0, scaled_dr / s_r, 0.0)
    return _padded(u_dr, rank), _padded(s_r, rank), _repeated(vh_rk, rank)


def truncate(left_dm: Tensor, right_mk: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of a product at a lower rank (Eckart and Young 1936)."""
    scaled_dr, vh_rk = _split(left_dm, right_mk, rank=rank)
    return _padded(scaled_dr, rank), _repeated(vh_rk, rank)


def _split(left_dm: Tensor, right_mk: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """U S and V^T of the largest singular values, by the small matrices L^T L and R R^T instead of QR.

    With R R^T = Q W Q^T and C = Q W^1/2, the right singular vectors of L R are R^T C^-T Y, where Y diagonalises
    C^T L^T L C. Then U S = L C Y, so that U S V^T is L R itself whatever rounding does to Y. Small matrices are
    float64; products with thin ones have the thin one's type, whose rounding they would get anyway.
    """
    w_m, q_mm = torch.linalg.eigh(_gram(right_mk))
    is_used_m = w_m > DEAD * w_m[-1]
    root_m, q_mp = w_m[is_used_m].sqrt(), q_mm[:, is_used_m]
    if not len(root_m):  # R is zero: any direction will do, as U S is zero
        return left_dm[:, :0], torch.eye(min(rank, right_mk.shape[1]), right_mk.shape[1], dtype=right_mk.dtype)
    c_mp = q_mp * root_m
    y_pr = torch.linalg.eigh(c_mp.T @ _gram(left_dm.T) @ c_mp)[1].flip(1)[:, :rank]
    return left_dm @ (c_mp @ y_pr).to(left_dm.dtype), ((q_mp / root_m) @ y_pr).T.to(right_mk.dtype) @ right_mk


def _gram(rows_mn: Tensor) -> Tensor:
    """X X^T in float64; numpy notices the symmetry and does half of the work."""
    values = rows_mn.double().numpy()
    return torch.from_numpy(values @ values.T)


def _padded(values: Tensor, size: int) -> Tensor:
    """Zeros at the end of the last axis, up to `size`."""
    return torch.nn.functional.pad(values, (0, size - values.shape[-1]))


def _repeated(rows: Tensor, size: int) -> Tensor:
    """The first rows again at the end, up to `size`: where rows are dead weight, a site still refuses zero ones."""
    return torch.cat([rows] * -(-size // rows.shape[0]))[:size]
