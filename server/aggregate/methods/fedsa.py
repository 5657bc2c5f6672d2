"""A is averaged, and every site keeps a B of its own (FedSA-LoRA: Guo et al. 2025, arXiv:2410.01463).

    A <- sum_i p_i A_i,   B_i stays at site i

Site i's weight is W0 + s B_i A, which no other party can form. The coordinator's own B stays zero and stands for
nothing.
"""

from typing import Final

from common.run.catalogue.methods import FACTS
from server.aggregate import mean

facts: Final = FACTS["fedsa"]
start = mean.start
apply = mean.add
