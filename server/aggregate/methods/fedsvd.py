"""B is averaged under an A that the coordinator turns to where B A points (FedSVD: arXiv:2505.12805).

    B' = sum_i p_i B_i ;   U S V^T = SVD(B' A), of rank r at most, so that nothing is cut ;   A <- V^T,  B <- U S

A always has orthonormal rows. The refresh uses released values alone, so that it costs no privacy.
"""

from typing import Final

from torch import Tensor

from common.run.catalogue.methods import FACTS
from server.aggregate import factored, mean
from server.aggregate.method import State

facts: Final = FACTS["fedsvd"]
start = mean.start


def apply(state: State, combined: State) -> State:
    """Average, then factor anew; the product is that of the average."""
    after: dict[str, Tensor] = {}
    for module, (b_dr, a_rk) in factored.modules(mean.add(state, combined)).items():
        after |= factored.named(module, *factored.truncate(b_dr.double(), a_rk.double(), rank=a_rk.shape[0]))
    return after
