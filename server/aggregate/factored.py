"""Products of thin matrices, factored: QR and the SVD of a small matrix, never a d x k one.

d and k: output and input width of a module, m: columns of a pair, r: rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
SIDE_A_SUFFIX, SIDE_B_SUFFIX = ".residual_A.weight", ".residual_B.weight"


def modules(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The pair (B, A) of every module that an adapter touches, by the module's name.

    The effective change of the module's weight is `scale * B A`.
    """
    names = [name.removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX)]
    return {name: (tensors[name + B_SUFFIX], tensors[name + A_SUFFIX]) for name in sorted(names)}


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
    u_dr, v_rk = truncate(left_dm.double(), right_mk.double(), rank=like[1].shape[0])
    return {module + SIDE_A_SUFFIX: v_rk.to(torch.float32), module + SIDE_B_SUFFIX: u_dr.to(torch.float32)}


def named(module: str, b_dr: Tensor, a_rk: Tensor) -> dict[str, Tensor]:
    """A pair under its tensors' names, float32."""
    return {module + A_SUFFIX: a_rk.to(torch.float32), module + B_SUFFIX: b_dr.to(torch.float32)}


def norm(left_dm: Tensor, right_mk: Tensor) -> float:
    """Frobenius norm of a product, in float64, by two QR factorisations."""
    r_left = torch.linalg.qr(left_dm.double(), mode="r")[1]
    r_right = torch.linalg.qr(right_mk.double().T, mode="r")[1]
    return float(torch.linalg.matrix_norm(r_left @ r_right.T))


def svd(left_dm: Tensor, right_mk: Tensor, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest `rank` singular values of a product, descending, and their vectors: U (d x r), S (r), V^T (r x k).

    A product that has fewer gets zeros in S and U for the rest; V^T always has `rank` rows of length one,
    orthonormal as long as `rank` is at most k.
    """
    q_left, r_left = torch.linalg.qr(left_dm)
    q_right, r_right = torch.linalg.qr(right_mk.T)
    u_pp, s, vh_qq = torch.linalg.svd(r_left @ r_right.T)
    u_dr = _padded(q_left @ u_pp[:, :rank], rank)
    return u_dr, _padded(s[:rank], rank), _repeated(vh_qq[:rank] @ q_right.T, rank)


def truncate(left_dm: Tensor, right_mk: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of a product at a lower rank (Eckart and Young 1936)."""
    u_dr, s_r, vh_rk = svd(left_dm, right_mk, rank=rank)
    return u_dr * s_r, vh_rk


def _padded(values: Tensor, size: int) -> Tensor:
    """Zeros at the end of the last axis, up to `size`."""
    return torch.nn.functional.pad(values, (0, size - values.shape[-1]))


def _repeated(rows: Tensor, size: int) -> Tensor:
    """The first rows again at the end, up to `size`: where rows are dead weight, a site still refuses zero ones."""
    return torch.cat([rows] * -(-size // rows.shape[0]))[:size]
