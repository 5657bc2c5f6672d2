"""B and A are averaged in turn, the other factor being the same at all sites (RoLoRA: arXiv:2502.01755).

    even rounds:  B <- sum_i p_i B_i        odd rounds:  A <- sum_i p_i A_i

Each round is exact, since one factor is common. The first trains B: while B is zero, no gradient reaches A.
"""

from typing import Final

from common.run.catalogue.methods import FACTS
from server.aggregate import mean

facts: Final = FACTS["rolora"]
start = mean.start
apply = mean.add
