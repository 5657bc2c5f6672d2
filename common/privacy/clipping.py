"""L2 norms of updates, held to a limit; and a limit that follows a quantile of the norms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from common import accounting
from common.errors import PrivacyError
from common.privacy.noise import Noise
from common.run.schema.privacy import Private

CHUNK: Final = 1 << 16  # values, so that what is made of them stays in the processor's cache
COUNT_NOISE_SHARE: Final = 20
COUNT_STEPS: Final = 1 << 20  # of the noise on a count; halves are whole numbers of them


def norm(change: Mapping[str, Tensor]) -> float:
    """L2 norm over all tensors, in float64, a piece at a time, so that no copy crosses memory."""
    buffer, squares = torch.empty(CHUNK, dtype=torch.float64), 0.0
    for tensor in change.values():
        for piece in torch.split(tensor.detach().flatten(), CHUNK):
            values = buffer[: len(piece)].copy_(piece)
            squares += float(torch.dot(values, values))
    return math.sqrt(squares)


def scaled(change: Mapping[str, Tensor], max_norm: float) -> tuple[Mapping[str, Tensor], float]:
    """An update, scaled down to `max_norm` in float32 where it is longer, and its norm before.

    Args:
        max_norm: Largest L2 norm over all tensors together; 0 leaves it alone.

    Privacy: L2 sensitivity `max_norm` of a sum, one site added or removed; rounding in float32 may pass it by about
        2^-23 of itself, for which `noise.added` allows. Values that are not finite stay so, and are the caller's to
        refuse. The norm that is returned is not protected.
    Source: Sun et al. 2019, arXiv:1911.07963, section 4; McMahan et al. 2018, arXiv:1710.06963, FlatClip.

    Example:
        >>> scaled({"b": torch.tensor([3.0, 4.0])}, 1.0)
        ({'b': tensor([0.6000, 0.8000])}, 5.0)
    """
    found = norm(change)
    if not max_norm or found <= max_norm:
        return change, found
    return {name: tensor.float() * (max_norm / found) for name, tensor in change.items()}, found


@dataclass
class ClipNorm:
    """C, which follows a quantile of the norms where that is asked for.

    Attributes:
        value: Largest norm that a unit's gradient, or a site's update, may have now.
        noise_multiplier: Of the sum; larger than that of the step if counts are released, too.
        count_noise_std: Of the noise on the count of units within C; 0 where C stays.
    """

    value: float
    noise_multiplier: float
    count_noise_std: float

    @classmethod
    def of(cls, privacy: Private, expected: float) -> "ClipNorm":
        """As the run says; the noise of the count is a twentieth of the expected number, as in the source.

        Raises:
            PrivacyError: The batch is too small for C to follow its units.
        """
        if not privacy.adaptive_clipping:
            return cls(privacy.clip_norm, privacy.noise_multiplier, 0.0)
        std = expected / COUNT_NOISE_SHARE
        try:
            left = accounting.gradient_noise_multiplier(privacy.noise_multiplier, count_noise_std=std)
        except ValueError as error:
            raise PrivacyError(
                f"privacy.adaptive_clipping: {expected:.0f} {privacy.mode}s at a time are too few to count them "
                "privately; raise privacy.sampling_prob or keep clip_norm fixed"
            ) from error
        return cls(privacy.clip_norm, left, std)

    def follow(self, norms_u: Tensor, *, privacy: Private, expected: float, source: Noise) -> None:
        """Move C towards the wanted quantile by a noised count of the units within it.

        Privacy: each unit adds +1/2 or -1/2 to the count, so its sensitivity is 1/2, one unit added or removed; the
        count's noise is charged with the step's (`accounting.gradient_noise_multiplier`). Norms never leave.
        Source: Andrew et al. 2021, arXiv:1905.03871, algorithm 1.
        """
        if not self.count_noise_std:
            return
        count = float((norms_u <= self.value).double().sub(0.5).sum())
        steps = source.discrete(1, std=self.count_noise_std * COUNT_STEPS, device=torch.device("cpu"))
        noised = count + float(steps) / COUNT_STEPS
        self.value *= math.exp(-privacy.clip_learning_rate * (noised / expected + 0.5 - privacy.clip_quantile))
