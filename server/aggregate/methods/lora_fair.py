"""The mean of both factors, B then corrected for what that leaves out (LoRA-FAIR: Bian et al. 2025, arXiv:2411.14961).

    A <- sum_i p_i A_i = A',   B <- B' + dB,   B' = sum_i p_i B_i,
    dB = argmin_X || sum_i p_i B_i A_i - (B' + X) A' ||^2 + lambda || X ||^2
       = (sum_i p_i B_i (A_i - A')) A'^T (A' A'^T + lambda I)^-1

The paper's equation 8 with the Frobenius norm in the place of the cosine, which has this closed form where the paper
takes steps of gradient descent; lambda is the paper's. It recovers what the rows of A' can hold.
"""

from typing import Final

import torch
from torch import Tensor

from common.run.catalogue.methods import FACTS
from server.aggregate import factored, mean, products
from server.aggregate.method import State
from server.aggregate.methods import fedex

LAMBDA: Final = 0.01
facts: Final = FACTS["lora_fair"]
start = fedex.start


def apply(state: State, combined: State) -> State:
    """The next global adapter."""
    after: dict[str, Tensor] = dict(mean.add(state, combined))
    stacked = products.pairs(combined)
    for module, (b_dr, a_rk) in factored.modules(after).items():
        left_dm, right_mk = stacked[module]
        a = a_rk.double()
        apart_mk = right_mk.double() - a.repeat(len(right_mk) // len(a), 1)
        target_dr = left_dm.double() @ (apart_mk @ a.T)
        ridge_rr = a @ a.T + LAMBDA * torch.eye(len(a), dtype=torch.float64)
        after |= factored.named(module, b_dr.double() + torch.linalg.solve(ridge_rr, target_dr.T).T, a)
    return after
