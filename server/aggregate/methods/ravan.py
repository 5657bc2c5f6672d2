"""A and B stay as they were drawn, in heads; the cores between them are averaged (RAVAN: arXiv:2506.05568).

    H_h <- sum_i p_i (s_h H_h)_i,   so that   sum_h B_h H_h A_h = sum_i p_i sum_h B_h (s_h H_h)_i A_h   exactly

Sites send the products, so that their scales s need no average of their own; see `common.adapter.cores`.
"""

from typing import Final

from common.run.catalogue.methods import FACTS
from server.aggregate import mean

facts: Final = FACTS["ravan"]
start = mean.start
apply = mean.add
