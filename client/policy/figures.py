"""What a site that demands differential privacy reports beside updates: counts and held-out figures, noised, charged.

A unit is on one side of the split, and which one is the site's own secret (`client.data.split`), so that one unit more
or less changes one of the two counts by one. In a held-out figure each unit is one number from 0 to 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from client.ledger.budget import COUNTS
from client.policy.file import Policy
from common.errors import ModelError
from common.frame.records import OpenedHead
from common.loss import evaluation, preference_score
from common.loss.evaluation import Score
from common.loss.objectives import Example
from common.model.base import Engine
from common.privacy import noise
from common.privacy.noise import Noise
from common.run.schema.training import Objective


@dataclass(frozen=True)
class FigureNoise:
    """How held-out figures of a site are released.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the L2 norm that one unit can have.
        max_loss: Largest mean loss of a unit, nats; a higher one counts as this.
    """

    noise_multiplier: float
    max_loss: float
    source: Noise


def counts(num_units: tuple[int, int], *, rules: Policy, source: Noise) -> dict[str, int]:
    """A site's numbers of units as they may be reported, at least 1 each: `train` and `held_out`.

    Privacy: the pair has L2 sensitivity 1 under adding or removing one unit; the noise has `privacy.count_noise`.
    """
    sum_2 = torch.tensor(num_units, dtype=torch.float64)
    noised = noise.added({COUNTS: sum_2}, noise_std=rules.privacy.count_noise, clip_norm=1.0, source=source)[COUNTS]
    train, held_out = (max(1, round(value)) for value in noised.tolist())
    return {"train": train, "held_out": held_out}


def head_of_units(head: OpenedHead, released: Mapping[str, int], *, rules: Policy) -> OpenedHead:
    """A head with released numbers of units in the place of rows; none held out where no figure of them may leave."""
    held_out = released["held_out"] if rules.evaluation.noise_multiplier else 0
    return replace(head, num_examples=released["train"], num_held_out=held_out)


def score(
    engine: Engine,
    rows: Sequence[Example],
    *,
    objective: Objective,
    batch_size: int,
    num_rows: int,
    noised_by: FigureNoise,
) -> Score:
    """Held-out figures as the noised sum over units of what each has by itself; no answers are generated.

    Args:
        engine: With the adapter that is scored.
        rows: Held-out rows; those of preferences with their references.
        batch_size: Rows of a unit in memory at once; no two units are in one batch.
        num_rows: The number of units as it was released; the mean is over it.

    Returns:
        Sums over `num_rows`, each unit counting as one answer token.

    Privacy: a unit has F figures from 0 to 1, so the sum has L2 sensitivity sqrt(F) under adding or removing one unit;
        noise of standard deviation `noise_multiplier` sqrt(F) is added once. All else is computed from that.
    """
    units: dict[str, list[Example]] = {}
    for row in rows:
        units.setdefault(row.unit, []).append(row)
    width = 1 if objective.kind == "sft" else 3
    sum_f = torch.zeros(width, dtype=torch.float64)
    for examples in units.values():
        sum_f += _of_unit(engine, examples, objective=objective, batch_size=batch_size, max_loss=noised_by.max_loss)
    noised_f = noise.added(
        {"f": sum_f}, noise_std=noised_by.noise_multiplier * width**0.5, clip_norm=width**0.5, source=noised_by.source
    )["f"]
    within = [min(max(float(value), 0.0), float(num_rows)) for value in noised_f]
    loss = within[0] * noised_by.max_loss
    plain = Score(loss, num_rows, num_generated=0, num_exact=0, seconds=0.0)
    if objective.kind == "sft":
        return plain
    return replace(plain, preference_loss_sum=within[1] * noised_by.max_loss, num_preferred=round(within[2]))


def _of_unit(
    engine: Engine, rows: Sequence[Example], *, objective: Objective, batch_size: int, max_loss: float
) -> torch.Tensor:
    """One unit's figures from 0 to 1: loss on answers; of preferences also their loss and the share of agreement."""
    # A loss that is not finite counts as the largest, so that no unit can break a release off.
    try:
        if objective.kind == "sft":
            encoded = [row for example in rows for row in example.rows]
            nll_sum, num_tokens = evaluation.held_out_nll(engine, encoded, batch_size=batch_size)
            figures = [nll_sum / (num_tokens * max_loss)]
        else:
            scored = preference_score.score(engine, rows, objective, batch_size=batch_size)
            figures = [
                scored.nll_sum / (scored.num_answer_tokens * max_loss),
                (scored.preference_loss_sum or 0.0) / (len(rows) * max_loss),
                (scored.num_preferred or 0) / len(rows),
            ]
    except (ModelError, ZeroDivisionError):
        return torch.tensor([1.0] if objective.kind == "sft" else [1.0, 1.0, 0.0], dtype=torch.float64)
    return torch.tensor(figures, dtype=torch.float64).nan_to_num(nan=1.0).clamp(0.0, 1.0)
