"""The only way out: a raw delta becomes bytes that may be sent, as the run's `[privacy]` says."""

import math
from dataclasses import dataclass

from common import adapter, clipping, noise
from common.adapter import Tensors, WireDtype
from common.config_privacy import PrivacyConfig, Protection
from common.errors import PrivacyError
from common.noise import Noise


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
    raw_delta: RawDelta,
    *,
    privacy: PrivacyConfig,
    trained_with: Protection,
    dtype: WireDtype,
    num_shares: int,
    source: Noise,
) -> OutgoingUpdate:
    """Prepare an update for sending.

    Args:
        raw_delta: What training changed.
        privacy: What the run promises.
        trained_with: What the training really did; gradients are noised there, where units can be told apart.
        dtype: Of the values that travel.
        num_shares: Sites whose shares of the noise must do, where sites add it.
        source: Of that noise.

    Raises:
        PrivacyError: The training did not do what the run promises.
    """
    if privacy.is_private_per_site and trained_with == "none":
        tensors = _site_level(raw_delta.tensors, privacy=privacy, num_shares=num_shares, source=source)
        return OutgoingUpdate(adapter.encode(tensors, dtype=dtype), protection="site")
    if trained_with != privacy.mode:
        raise PrivacyError(
            f"privacy.mode = '{privacy.mode}' and the training was done with '{trained_with}'; nothing was sent"
        )
    return OutgoingUpdate(adapter.encode(raw_delta.tensors, dtype=dtype), protection=trained_with)


def _site_level(tensors: Tensors, *, privacy: PrivacyConfig, num_shares: int, source: Noise) -> Tensors:
    """An update no longer than the clip norm over all its tensors, under this site's share of the noise if it adds one.

    n shares of variance (sigma C)^2 / n add up to (sigma C)^2; more sites than n only add to it.
    """
    clipped, _ = clipping.scaled(tensors, privacy.clip_norm)
    if privacy.noise_at == "server":
        return clipped
    noise_std = privacy.noise_multiplier * privacy.clip_norm / math.sqrt(num_shares)
    noised = noise.added(clipped, noise_std=noise_std, clip_norm=privacy.clip_norm, source=source)
    return {name: values.float() for name, values in noised.items()}
