"""The one place where gradients of training rows are taken."""

from collections.abc import Sequence

import torch

from common.loss import objectives, preference_score
from common.loss.objectives import SFT, Example, Objective
from common.model.base import Engine


def mean_gradient(
    engine: Engine, rows: Sequence[Example], *, micro_batch_size: int, objective: Objective = SFT
) -> float:
    """Set every trainable parameter's `.grad` to that of the mean loss of a batch.

    The mean is over answer tokens, or over examples where preferences are learnt. The batch is cut into micro-batches
    of similar length; the gradient does not depend on the cut.

    Args:
        engine: Model in training mode, gradients cleared.
        rows: The logical batch.
        micro_batch_size: Examples that go through the model at once; a pair has two rows.
        objective: What is lowered.

    Returns:
        The mean loss: under `sft` the negative log-likelihood per answer token, nats.
    """
    num_terms = objectives.num_terms(rows, objective)
    origin = preference_score.reference_point(engine, rows, objective, batch_size=micro_batch_size)
    total = torch.zeros((), device=engine.device)
    for part in objectives.parts(rows, micro_batch_size):
        loss = objectives.loss_sum(engine, part, objective, origin=origin)
        (loss / num_terms).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return float(total) / num_terms
