"""DP-SGD over privacy units: draw, clip, add up, noise once, divide by the expected number. U units, P parameters.

From clipping to noise all is whole numbers of steps of a grid (`noise.to_grid`), so that sums are exact and what one
unit adds does not depend on the others.

Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with the unit of a patient in the place of an example.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from client.train import unit_gradients, units
from client.train.units import Unit
from common import accounting
from common.adapter import adapter
from common.errors import PrivacyError
from common.loss.objectives import SFT, Example, Objective
from common.model.base import Engine
from common.privacy import noise
from common.privacy.clipping import ClipNorm
from common.privacy.noise import Noise
from common.run.schema.privacy import PrivacyConfig

TINY: Final = 1e-6  # added to norms, so that a zero gradient has a scale
ROUNDING: Final = 2.0**-22  # of a norm: more than adding up 2^30 squares in float64 and scaling can be wrong by


class Trained(Protocol):
    """What a step needs of an engine; an audit has coordinates of its own in its place."""

    @property
    def model(self) -> nn.Module:
        """Its trainable parameters get their gradients."""

    @property
    def device(self) -> torch.device:
        """Where they are."""


def gradients(
    engine: Engine,
    rows: Sequence[Example],
    *,
    privacy: PrivacyConfig,
    num_steps: int,
    source: Noise,
    objective: Objective = SFT,
) -> Generator[None]:
    """Set every trainable parameter's `.grad` to a private one, once for each step.

    A step without any unit is noised like every other: whether one was drawn is nobody's to know. Each unit goes
    through the model alone: in a pass with others its gradient would be rounded as their number and lengths have it,
    which in bfloat16 moved the sum of 12 units by 1.06 C.

    Args:
        engine: Holds the adapter.
        rows: The site's training rows; their units are told apart by `unit`.
        privacy: Section `[privacy]`, resolved.
        num_steps: Steps of this round.
        source: Of noise and draws.
        objective: What is lowered.

    Raises:
        PrivacyError: Delta is too large for so many units, or the model couples units (see `unit_gradients.prepared`).

    Privacy: each step is a Poisson-sampled Gaussian mechanism with `privacy.sampling_prob` and
    `privacy.noise_multiplier` under adding or removing one unit; the number of units counts as public.
    """
    population = units.group(rows)
    _check_delta(privacy.dp_delta, len(population))
    with unit_gradients.prepared(engine, method=privacy.clipping, objective=objective) as (take, _):
        yield from steps(
            engine,
            population,
            take=take,
            privacy=privacy,
            num_steps=num_steps,
            source=source,
        )


def _check_delta(dp_delta: float, num_units: int) -> None:
    """A delta near one in the number of units would allow to tell a whole unit's rows.

    Raises:
        PrivacyError: See `gradients`.
    """
    if not dp_delta <= accounting.largest_delta(num_units):
        raise PrivacyError(
            f"privacy.dp_delta = {dp_delta:g} is too large for the {num_units} units of this site; "
            f"set {accounting.delta_rule(num_units)}"
        )


def steps(
    engine: Trained,
    population: Sequence[Unit],
    *,
    take: unit_gradients.Take,
    privacy: PrivacyConfig,
    num_steps: int,
    source: Noise,
    units_at_once: int = 1,
) -> Generator[None]:
    """The mechanism alone, whatever a unit's gradient is: draw, clip, add up, noise; see `gradients`.

    Args:
        engine: Whose parameters get the private gradients.
        population: The units.
        take: From some units to their gradients.
        privacy: Section `[privacy]`, resolved.
        num_steps: Steps to take.
        source: Of noise and draws.
        units_at_once: Units that `take` is given; more than one only where no model is in it.
    """
    expected = privacy.sampling_prob * len(population)
    limit = ClipNorm.of(privacy, expected)
    for _ in range(num_steps):
        drawn = units.poisson(
            population, sampling_prob=privacy.sampling_prob, max_rows=privacy.max_rows_per_unit, noise=source
        )
        batches = (drawn[start : start + units_at_once] for start in range(0, len(drawn), units_at_once))
        norms_u = set_gradients(engine, batches, take=take, limit=limit, expected=expected, source=source)
        limit.follow(norms_u, privacy=privacy, expected=expected, source=source)
        yield


def set_gradients(
    engine: Trained,
    batches: Iterator[Sequence[Unit]],
    *,
    take: unit_gradients.Take,
    limit: ClipNorm,
    expected: float,
    source: Noise,
) -> Tensor:
    """One step: noise the clipped sum once, both in whole steps of the grid, and divide by the expected number.

    Returns:
        Every unit's norm before clipping, which is not private.
    """
    trained = dict(sorted(adapter.parameters(engine.model).items()))
    num_parameters = sum(parameter.numel() for parameter in trained.values())
    source.prepare(num_parameters, device=engine.device)
    sum_p, norms_u = clipped_sum(
        batches, take=take, clip_norm=limit.value, num_parameters=num_parameters, device=engine.device
    )
    noise_std = limit.noise_multiplier / noise.grid_step(1.0)
    noised_p = source.discrete(num_parameters, std=noise_std, device=engine.device).add_(sum_p)
    released_p = noised_p.mul_(noise.grid_step(limit.value) / expected).float()
    start = 0
    for parameter in trained.values():
        end = start + parameter.numel()
        parameter.grad, start = released_p[start:end].view_as(parameter), end
    return norms_u


def clipped_sum(
    batches: Iterator[Sequence[Unit]],
    *,
    take: unit_gradients.Take,
    clip_norm: float,
    num_parameters: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Sum of the units' gradients, each scaled down to `clip_norm` at most.

    Returns:
        The sum, (P,) whole steps of the grid in float64, and every unit's norm before clipping. Neither is private.

    Privacy: L2 sensitivity `clip_norm`, that is 2^30 steps, under adding or removing one unit; exact, as whole numbers
    below 2^53 are added without rounding: 2^23 units at least.
    """
    sum_p: Tensor | None = None  # made after the first batch, whose activations have left the memory by then
    norms: list[Tensor] = []
    for batch in batches:
        part_p, norms_u = clip(take(batch), clip_norm=clip_norm)
        sum_p = part_p if sum_p is None else sum_p.add_(part_p)
        norms.append(norms_u)
    if sum_p is None:
        return torch.zeros(num_parameters, dtype=torch.float64, device=device), torch.zeros(0, device=device)
    return sum_p, torch.cat(norms)


def clip(gradients_up: Tensor, *, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Add up units' gradients, each scaled by min(1, C / norm) over all parameters and rounded to the grid.

    A unit whose gradient is not finite adds nothing, as if it were zero: a step that failed for it would tell that it
    was drawn. The norm is taken in float64 and counted as longer by more than its rounding, and values are rounded
    towards zero, so that what is added is no longer than C, exactly.

    Shape: (U, P) to (P,), whole steps of the grid in float64, and (U,), the norms before clipping.

    Example:
        >>> clip(torch.tensor([[3.0, 4.0], [0.0, 0.5]]), clip_norm=1.0)[1].tolist()
        [5.0, 0.5]
    """
    norms_u: Tensor = torch.linalg.vector_norm(gradients_up, dim=1, dtype=torch.float64)
    is_finite_u = norms_u.isfinite()
    scales_u = (clip_norm / (norms_u * (1 + ROUNDING) + TINY)).clamp(max=1.0)
    total_p = gradients_up.new_zeros(gradients_up.shape[1], dtype=torch.float64)
    for gradient_p, scale, is_finite in zip(gradients_up, scales_u, is_finite_u.tolist(), strict=True):
        if is_finite:
            total_p += noise.to_grid(gradient_p.double() * scale, clip_norm=clip_norm)
    return total_p, norms_u
