"""The mean of the products, cut to the adapter's rank (FlexLoRA: arXiv:2402.11505), by a factored SVD.

    U S V^T = SVD(sum_i p_i B_i A_i) ;   B <- U_r S_r^1/2 ,   A <- S_r^1/2 V_r^T

The best adapter of its rank, and not exact: what is cut is lost, and the gap says how much that is. Sites of a smaller
rank get the first columns of B and rows of A; the mean is then that of `products.start_partitioned`.
"""

from typing import Final

import torch
from torch import Tensor

from common.run.catalogue.methods import FACTS
from server.aggregate import factored, products
from server.aggregate.method import State

SMALLEST: Final = 1e-7  # of the largest singular value; float32 holds nothing below it
facts: Final = FACTS["flexlora"]
start = products.start_partitioned


def apply(state: State, combined: State) -> State:
    """The next global adapter, both factors of equal length in every direction."""
    after: dict[str, Tensor] = {}
    stacked = products.pairs(combined)
    for module, (_, a_rk) in factored.modules(state).items():
        left_dm, right_mk = stacked[module]
        u_dr, s_r, vh_rk = factored.svd(left_dm, right_mk, rank=a_rk.shape[0])
        after |= factored.named(module, *_balanced(u_dr, s_r, vh_rk))
    return after


def _balanced(u_dr: Tensor, s_r: Tensor, vh_rk: Tensor) -> tuple[Tensor, Tensor]:
    """Half of each singular value to either factor; an unused direction starts anew, with B zero and A not."""
    is_used_r = s_r > SMALLEST * s_r[0]
    root_r = s_r.sqrt()
    b_dr = u_dr * torch.where(is_used_r, root_r, 0.0)
    return b_dr, vh_rk * torch.where(is_used_r, root_r, 1.0)[:, None]
