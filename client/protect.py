"""The only way out: a raw delta becomes bytes that may be sent, as the run's `[privacy]` says."""

from dataclasses import dataclass

from common import adapter
from common.adapter import Tensors, WireDtype
from common.config_privacy import PrivacyConfig, Protection
from common.errors import PrivacyError


@dataclass(frozen=True)
class RawDelta:
    """Adapter after local training minus before; has no way to the wire but through `protect`."""

    tensors: Tensors


@dataclass(frozen=True)
class OutgoingUpdate:
    """Bytes that may leave the site.

    Attributes:
        body: Safetensors bytes.
        protection: What was done to them; `none` says that the update is unprotected.
    """

    body: bytes
    protection: Protection


def subtract(after: Tensors, before: Tensors) -> RawDelta:
    """What local training changed.

    Raises:
        ModelError: The result holds NaN, infinity or a value that no training gives.
    """
    difference = {name: after[name] - before[name] for name in before}
    adapter.check_values(difference, what="local update")
    return RawDelta(difference)


def protect(
    raw_delta: RawDelta, *, privacy: PrivacyConfig, trained_with: Protection, dtype: WireDtype
) -> OutgoingUpdate:
    """Prepare an update for sending.

    Args:
        raw_delta: What training changed.
        privacy: What the run promises.
        trained_with: What the training really did; gradients are noised there, where units can be told apart.
        dtype: Of the values that travel.

    Raises:
        PrivacyError: The training did not do what the run promises.
    """
    if trained_with != privacy.mode:
        raise PrivacyError(
            f"privacy.mode = '{privacy.mode}' and the training was done with '{trained_with}'; nothing was sent"
        )
    return OutgoingUpdate(adapter.encode(raw_delta.tensors, dtype=dtype), protection=trained_with)
