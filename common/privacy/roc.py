"""How well scores tell those that were trained on from those that were not. B resamples."""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

NUM_RESAMPLES: Final = 1000
FALSE_POSITIVE_RATE: Final = 0.01
INTERVAL: Final = (0.025, 0.975)


@dataclass(frozen=True)
class Rates:
    """Each with the ends of its 95 % bootstrap interval.

    Attributes:
        auc: Probability that a member scores above a non-member; 0.5 is chance.
        auc_interval: Of `auc`.
        tpr: Share of the members that are found while at most 1 % of the non-members are taken for members.
        tpr_interval: Of `tpr`.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: float
    tpr_interval: tuple[float, float]

    def figures(self) -> dict[str, float]:
        """As a finding tells them."""
        return {
            "auc": self.auc,
            "auc_low": self.auc_interval[0],
            "auc_high": self.auc_interval[1],
            "tpr_at_1_percent_fpr": self.tpr,
            "tpr_low": self.tpr_interval[0],
            "tpr_high": self.tpr_interval[1],
        }


def rates(scores_m: Tensor, is_in_m: Tensor) -> Rates:
    """Area under the curve, and true positives at 1 % false positives.

    Args:
        scores_m: Higher for members.

    Raises:
        ValueError: Nobody on one of the sides.
    """
    inside, outside = scores_m[is_in_m].double(), scores_m[~is_in_m].double()
    if not len(inside) or not len(outside):
        raise ValueError("members and non-members are both needed")
    generator = torch.Generator().manual_seed(0)
    pairs = [(_drawn(inside, generator), _drawn(outside, generator)) for _ in range(NUM_RESAMPLES)]
    aucs = torch.tensor([auc(*pair) for pair in pairs])
    tprs = torch.tensor([tpr(*pair) for pair in pairs])
    return Rates(auc(inside, outside), _interval(aucs), tpr(inside, outside), _interval(tprs))


def auc(inside_i: Tensor, outside_o: Tensor) -> float:
    """Probability that a member scores above a non-member, a tie counting half.

    Example:
        >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    ordered_o = outside_o.sort().values
    below = torch.searchsorted(ordered_o, inside_i) + torch.searchsorted(ordered_o, inside_i, right=True)
    return float(below.double().mean()) / (2 * len(outside_o))


def tpr(inside_i: Tensor, outside_o: Tensor) -> float:
    """Share of the members above all but 1 % of the non-members.

    Example:
        >>> tpr(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.5
    """
    num_allowed = math.floor(FALSE_POSITIVE_RATE * len(outside_o))
    threshold = outside_o.sort(descending=True).values[num_allowed]
    return float((inside_i > threshold).double().mean())


def exposure(scores_m: Tensor, is_in_m: Tensor) -> float:
    """Mean exposure of the canaries that were used, in bits; the candidates of all are those that were not.

    Example:
        >>> exposure(torch.tensor([9.0, 1.0, 2.0, 3.0]), torch.tensor([True, False, False, False]))
        2.0
    """
    outside = scores_m[~is_in_m]
    found = [exposure_of(score, outside) for score in scores_m[is_in_m].tolist()]
    return math.fsum(found) / len(found)


def exposure_of(score: float, others_o: Tensor) -> float:
    """log2(candidates) - log2(rank) of one secret among itself and others that could have been it, in bits.

    A tie counts against the secret. Of a secret that was never seen, the rank is any with the same probability, and so
    the expectation is near log2(e) = 1.44 bits. The ceiling is log2(candidates).

    Source: Carlini et al. 2019, arXiv:1802.08232, section 4.3, with the rank among sampled candidates.

    Example:
        >>> exposure_of(2.5, torch.tensor([1.0, 2.0, 3.0]))
        1.0
    """
    rank = 1 + int((others_o >= score).sum())
    return math.log2(len(others_o) + 1) - math.log2(rank)


def _drawn(values: Tensor, generator: torch.Generator) -> Tensor:
    """As many, with replacement."""
    return values[torch.randint(len(values), (len(values),), generator=generator)]


def _interval(values_b: Tensor) -> tuple[float, float]:
    """Its ends."""
    low, high = (float(values_b.double().quantile(share)) for share in INTERVAL)
    return low, high
