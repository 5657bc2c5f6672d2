"""Canaries that only the mechanism sees: each unit's gradient is one reserved coordinate. P coordinates, U units.

Whoever knows the coordinate reads off it how much of the unit got through, which no attacker can do better. Draw, clip
and noise are those of training: only the model is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from client.train import private
from client.train.private import Unit
from common.privacy.noise import Noise
from common.run.schema.privacy import UnitPrivacy
from common.text.prompts import Encoded

LENGTH: Final = 10.0  # of a gradient over the clip norm, so that a clip that does nothing shows


@dataclass(frozen=True)
class Scores:
    """What came through.

    Attributes:
        score_m: The sum over all steps of each canary's coordinate, in units of the clip norm.
        is_in_m: Which canaries were among the units.
    """

    score_m: Tensor
    is_in_m: Tensor


def scores(*, num_canaries: int, privacy: UnitPrivacy, num_steps: int, source: Noise) -> Scores:
    """Take private steps over canaries, each of which is among the units with probability 1/2.

    Args:
        num_canaries: m.
        privacy: Section `[privacy]`, resolved.
        num_steps: T.
        source: Of the canaries' coins, and of the mechanism's draws and noise.
    """
    is_in_m = torch.from_numpy(source.uniform(num_canaries) < 0.5)
    units = [[Encoded((number,), (True,), str(number))] for number in is_in_m.nonzero().flatten().tolist()]
    values = nn.Parameter(torch.zeros(num_canaries))
    mechanism = private.Mechanism(units, parameters={"coordinates": values}, privacy=privacy, source=source)

    def take(units: Sequence[Unit]) -> Tensor:
        """(U, P): of a length over the clip norm, along the coordinate that a unit's only token names."""
        places_u = torch.tensor([unit[0].rows[0].input_ids[0] for unit in units])
        zeros_up = torch.zeros(len(units), num_canaries)
        return zeros_up.scatter_(1, places_u[:, None], LENGTH * privacy.clip_norm)

    score_m = torch.zeros(num_canaries, dtype=torch.float64)
    for _ in range(num_steps):
        drawn = mechanism.draw()
        mechanism.set_gradients([drawn] if drawn else [], take=take)
        if values.grad is not None:
            score_m += values.grad.double()
    expected = privacy.sampling_prob * len(units)
    return Scores(score_m * expected / privacy.clip_norm, is_in_m)
