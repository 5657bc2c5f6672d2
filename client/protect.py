"""The only way out: a raw delta becomes bytes that may be sent, as the run's `[privacy]` says."""

from dataclasses import dataclass

from common import adapter, config_privacy
from common.adapter import Tensors, WireDtype
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
        protection: What was done to them, in words; `none` says that the update is unprotected.
    """

    body: bytes
    protection: str


def subtract(after: Tensors, before: Tensors) -> RawDelta:
    """What local training changed.

    Raises:
        ModelError: The result holds NaN, infinity or a value that no training gives.
    """
    difference = {name: after[name] - before[name] for name in before}
    adapter.check_values(difference, what="local update")
    return RawDelta(difference)


def protect(raw_delta: RawDelta, *, privacy: config_privacy.PrivacyConfig, dtype: WireDtype) -> OutgoingUpdate:
    """Prepare an update for sending.

    Raises:
        PrivacyError: The run asks for a protection that this version does not have.
    """
    if privacy.mode != "none":
        raise PrivacyError(f"privacy.mode = '{privacy.mode}' is not built in this version; nothing was sent")
    return OutgoingUpdate(adapter.encode(raw_delta.tensors, dtype=dtype), protection="none")
