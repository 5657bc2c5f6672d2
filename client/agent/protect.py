"""The only way out: a raw delta becomes bytes that may be sent, as the run's `[privacy]` says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from common.adapter import adapter, compact
from common.adapter.adapter import Tensors
from common.errors import PrivacyError
from common.privacy import clipping, noise
from common.privacy.noise import Noise
from common.run.schema.privacy import PrivacyConfig, Protection, SitePrivacy
from common.run.schema.wire import WireConfig


@dataclass(frozen=True)
class RawDelta:
    """Adapter after local training minus before; has no way to the wire but through `protect`."""

    tensors: Tensors


@dataclass(frozen=True)
class OutgoingUpdate:
    """Bytes that may leave the site.

    Attributes:
        body: What `common.adapter.compact.decode_update` reads.
        protection: What was done to them; `none` says that the update is unprotected.
        left_out: What a sparse update left out; stays at the site. Empty without error feedback.
    """

    body: bytes
    protection: Protection
    left_out: Tensors


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
    num_shares: int,
    source: Noise,
    settings: WireConfig,
    draws: np.random.Generator,
    left_out: Tensors | None = None,
) -> OutgoingUpdate:
    """Prepare an update for sending.

    Args:
        raw_delta: What training changed.
        privacy: What the run promises.
        trained_with: What the training really did; gradients are noised there, where units can be told apart.
        num_shares: Sites whose shares of the noise must do, where sites add it.
        source: Of that noise.
        settings: The run's `[wire]`.
        draws: Of stochastic rounding.
        left_out: What the site's earlier updates left out; None without error feedback.

    Raises:
        PrivacyError: The training did not do what the run promises.
    """
    if privacy.mode == "site" and trained_with == "none":
        tensors = _site_level(raw_delta.tensors, privacy=privacy, num_shares=num_shares, source=source)
        return OutgoingUpdate(compact.encode_update(tensors, settings, draws=draws), "site", {})
    if trained_with != privacy.mode:
        raise PrivacyError(
            f"privacy.mode = '{privacy.mode}' and the training was done with '{trained_with}'; nothing was sent"
        )
    whole = raw_delta.tensors if left_out is None else _added(raw_delta.tensors, left_out)
    body = compact.encode_update(whole, settings, draws=draws)
    if left_out is None:
        return OutgoingUpdate(body, trained_with, {})
    sent = compact.decode_update(body, adapter.specs(whole), settings)
    return OutgoingUpdate(body, trained_with, {**left_out, **{name: whole[name] - sent[name] for name in whole}})


def _added(tensors: Tensors, left_out: Tensors) -> Mapping[str, Tensor]:
    """A change and what is still to be sent."""
    return {name: tensor + left_out[name] if name in left_out else tensor for name, tensor in tensors.items()}


def _site_level(tensors: Tensors, *, privacy: SitePrivacy, num_shares: int, source: Noise) -> Tensors:
    """An update no longer than the clip norm over all its tensors, under this site's share of the noise if it adds one.

    n shares of variance (sigma C)^2 / n add up to (sigma C)^2; more sites than n only add to it.
    """
    clipped, _ = clipping.scaled(tensors, privacy.clip_norm)
    if privacy.noise_at == "server":
        return clipped
    noise_std = privacy.noise_multiplier * privacy.clip_norm / math.sqrt(num_shares)
    noised = noise.added(clipped, noise_std=noise_std, clip_norm=privacy.clip_norm, source=source)
    return {name: values.float() for name, values in noised.items()}
