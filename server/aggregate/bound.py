"""Norm bounding: no single update may move the adapter further than the run allows."""

from server.aggregate.method import State


def norm(change: State) -> float:
    """L2 norm over all tensors, in float64."""
    return float(sum(float(tensor.double().square().sum()) for tensor in change.values()) ** 0.5)


def scaled(change: State, max_norm: float) -> tuple[State, float]:
    """An update, scaled down to `max_norm` where it is longer, and its norm before.

    Args:
        change: One site's update.
        max_norm: Largest L2 norm over all tensors together; 0 leaves it alone.

    Source: Sun et al. 2019, arXiv:1911.07963, section 4.

    Example:
        >>> import torch
        >>> scaled({"b": torch.tensor([3.0, 4.0])}, 1.0)
        ({'b': tensor([0.6000, 0.8000])}, 5.0)
    """
    found = norm(change)
    if not max_norm or found <= max_norm:
        return change, found
    return {name: tensor * (max_norm / found) for name, tensor in change.items()}, found
