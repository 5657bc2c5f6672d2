"""The mean of both LoRA factors (FedIT: Zhang et al. 2023, arXiv:2305.05644).

    A <- sum_i p_i A_i,   B <- sum_i p_i B_i

Biased: the product of the means is not the mean of the products. `gap.py` measures by how much.
"""

from typing import Final

from common.run.catalogue.methods import FACTS
from server.aggregate import mean

facts: Final = FACTS["fedavg"]
start = mean.start
apply = mean.add
