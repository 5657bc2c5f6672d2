"""The one place where gradients of training rows are taken."""

from collections.abc import Sequence

import torch

from common import prompts
from common.model import Engine, answer_nll
from common.prompts import Encoded


def mean_gradient(engine: Engine, rows: Sequence[Encoded], *, micro_batch_size: int) -> float:
    """Set every trainable parameter's `.grad` to that of the mean loss per answer token of a batch.

    The batch is cut into micro-batches of similar length; the gradient does not depend on the cut.

    Args:
        engine: Model in training mode, gradients cleared.
        rows: The logical batch.
        micro_batch_size: Rows that go through the model at once.

    Returns:
        Mean negative log-likelihood per answer token, nats.
    """
    num_tokens = sum(sum(row.is_answer[1:]) for row in rows)
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    total = torch.zeros((), device=engine.device)
    for start in range(0, len(rows), micro_batch_size):
        batch = prompts.collate(by_length[start : start + micro_batch_size], pad_id=engine.pad_id)
        nll, _ = answer_nll(engine.model, batch.to(engine.device))
        (nll / num_tokens).backward()  # type: ignore[no-untyped-call]
        total += nll.detach()
    return float(total) / num_tokens
