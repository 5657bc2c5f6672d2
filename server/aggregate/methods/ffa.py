"""A stays as it was drawn, B is averaged (FFA-LoRA: Sun et al. 2024, arXiv:2403.12313).

    B <- sum_i p_i B_i,   so that   B A = sum_i p_i B_i A   exactly

A has orthonormal rows, where the paper draws them as peft does: the gradient of B is then no larger than that of the
product, and no direction of A is weaker than another.
"""

from typing import Final

from common.run.catalogue.methods import FACTS
from server.aggregate import mean

facts: Final = FACTS["ffa"]
start = mean.start
apply = mean.add
