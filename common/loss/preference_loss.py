"""Losses of preferences as functions of log-probabilities; no model, no rows. N pairs or rated answers, nats."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(margin_n: Tensor, *, label_smoothing: float) -> Tensor:
    """Loss of each pair: -(1 - s) log sigmoid(m) - s log sigmoid(-m).

    Args:
        margin_n: beta times how much more the chosen answer has gained over the start than the rejected one.
        label_smoothing: s, the probability that a pair was labelled the wrong way round; 0 is plain DPO.

    Shape: (N,) to (N,).
    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; with s > 0 Mitchell 2023, conservative DPO, equation 3.

    Example:
        >>> import torch
        >>> round(float(dpo(torch.zeros(1), label_smoothing=0.0)), 4)
        0.6931
    """
    return -(1 - label_smoothing) * logsigmoid(margin_n) - label_smoothing * logsigmoid(-margin_n)


def kto(margin_n: Tensor, weight_n: Tensor) -> Tensor:
    """Loss of each rated answer: w (1 - sigmoid(m)).

    Args:
        margin_n: beta times the answer's gain over the start less the reference point; with the sign turned where the
            answer is not wanted.
        weight_n: w of the answer's kind.

    Shape: (N,) and (N,) to (N,).
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, equation 8.
    """
    return weight_n * (1 - margin_n.sigmoid())
