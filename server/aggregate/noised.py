"""A round's sum under differential privacy for sites as a whole: clipped, noised once, over the expected number.

    step = (sum_i clip(update_i, C) + N(0, sigma^2 C^2 I)) / (q N)

The divisor is the run file's and not the number that came, which would tell who did. A round for which no site was
drawn is noised like every other. Where the sites add the noise, their updates are added up as they are: one could not
be clipped any more without losing some of it.

Source: McMahan et al. 2018, arXiv:1710.06963, algorithm 1; Andrew et al. 2021, arXiv:1905.03871, algorithm 1.
"""

from collections.abc import Collection, Mapping
from typing import Final

import torch
from torch import Tensor

from common.privacy import clipping, noise
from common.privacy.clipping import ClipNorm
from common.privacy.noise import Noise
from common.run.schema.privacy import SitePrivacy
from server.aggregate.mean import WeightedMean
from server.aggregate.method import State

CLIP_NORM: Final = "privacy/clip_norm"  # in the coordinator's memory, which each checkpoint holds


class NoisedSum:
    """The sum of a round's updates, to be noised when all are in.

    Args:
        state: The tensors that sites send.
        privacy: Section `[privacy]`, resolved.
        expected: Sites of a round on average, by the run file alone.
        source: Of the noise.
        memory: Of the coordinator, with the clip norm where it follows the updates.
    """

    def __init__(
        self, state: State, *, privacy: SitePrivacy, expected: float, source: Noise, memory: Mapping[str, Tensor]
    ) -> None:
        self._sum, self._norms = WeightedMean(state), list[float]()
        self._privacy, self._expected, self._source = privacy, expected, source
        self._limit = ClipNorm.of(privacy, expected)
        if CLIP_NORM in memory:
            self._limit.value = float(memory[CLIP_NORM])

    @property
    def clip_norm(self) -> float:
        """C as it is now; `result` lets it follow the updates if the run says so."""
        return self._limit.value

    def add(self, upload: State, *, weight: float) -> None:
        """Add a site's update, no longer than C; all sites weigh the same.

        Raises:
            ValueError: The weight is not 1.
        """
        if weight != 1.0:
            raise ValueError("under differential privacy for sites every site has the weight 1")
        if self._privacy.noise_at == "server":
            upload, length = clipping.scaled(upload, self._limit.value)
            self._norms.append(length)
        self._sum.add(upload, weight=1.0)

    def result(self) -> State:
        """The noised sum over the expected number of sites, float32; draws noise, so ask once."""
        sums = self._sum.sums()
        if self._privacy.noise_at == "server":
            limit = self._limit
            noise_std = limit.noise_multiplier * limit.value
            sums = noise.added(sums, noise_std=noise_std, clip_norm=limit.value, source=self._source)
            self._follow()
        return {name: (total / self._expected).float() for name, total in sums.items()}

    def remembered(self, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The coordinator's memory with C for the next round, where it moves."""
        if not self._privacy.adaptive_clipping:
            return memory
        return {**memory, CLIP_NORM: torch.tensor(self._limit.value, dtype=torch.float64)}

    def _follow(self) -> None:
        """Let C follow the norms, never above its start, to which sites clip."""
        norms_k = torch.tensor(self._norms, dtype=torch.float64)
        self._limit.follow(norms_k, privacy=self._privacy, expected=self._expected, source=self._source)
        self._limit.value = min(self._limit.value, self._privacy.clip_norm)


def start(
    state: State,
    trained: Collection[str],
    *,
    privacy: SitePrivacy,
    expected: float,
    source: Noise,
    memory: Mapping[str, Tensor],
) -> NoisedSum:
    """Begin a round from the global adapter; `trained` are the names of the tensors that sites send."""
    sent = {name: state[name] for name in trained}
    return NoisedSum(sent, privacy=privacy, expected=expected, source=source, memory=memory)
