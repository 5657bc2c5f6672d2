"""All of the mean of the products goes beside the factors, which begin anew (FLoRA: arXiv:2409.05976).

    U V <- U V + sum_i p_i B_i A_i,   A drawn anew,   B <- 0

Where the paper adds the products to the base, they go into the side adapter, whose rank is capped: a quantised
base would lose them.
"""

import hashlib
import math
from typing import Final

import torch
from torch import Tensor

from common.adapter import adapter
from common.run.catalogue.methods import FACTS
from server.aggregate import factored, products
from server.aggregate.method import State

facts: Final = FACTS["flora"]
start = products.start


def apply(state: State, combined: State) -> State:
    """The next global adapter, its side adapter included."""
    after: dict[str, Tensor] = {}
    stacked, beside = products.pairs(combined), factored.side(state)
    for module, (b_dr, a_rk) in factored.modules(state).items():
        left_dm = torch.cat([beside[module][0], stacked[module][0]], dim=1)
        right_mk = torch.cat([beside[module][1], stacked[module][1]])
        after |= factored.cut_side(module, left_dm, right_mk, like=beside[module])
        after |= factored.named(module, torch.zeros_like(b_dr), _anew(a_rk))
    return after


def _anew(a_rk: Tensor) -> Tensor:
    """Another draw as peft makes it, from a seed that the last one gives: a resumed run draws the same."""
    digest = hashlib.sha256(adapter.encode({"a": a_rk}, dtype="float32")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return (2 * torch.rand(a_rk.shape, generator=generator) - 1) / math.sqrt(a_rk.shape[1])
