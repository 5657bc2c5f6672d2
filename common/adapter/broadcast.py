"""How the global adapter goes down: whole, as the steps from one that a site holds, or as its hash alone.

A request's head says which under `adapter`, with the hash of what the site must then hold; a site that comes to another
hash does nothing. So coordinator and site hold the same adapter, bit by bit. Where `wire.down` is float32 there are no
steps, and a request without `adapter` brings it whole. A site holds what the run starts from, which it makes of the
seed, and what it was sent last: so an adapter that is evaluated and then trained from crosses once.

Where `wire.down` is float32 and `wire.down_density` below 1, a request to train brings the adapter's largest values
alone and zeros for the others, and the site's update is the change to that; a request to evaluate brings all of it.
The coordinator keeps every value, so that it forgets nothing and needs no error feedback. A value counts as large by
its share of the largest in its rank direction: by size alone B, which starts at zero, would hardly travel beside A,
and a module with many inputs, whose A is small, would be sent zeros for both factors and could not train at all.
Source: Kuo et al. 2024, arXiv:2406.05233 (FLASC), the download, which takes the largest of all values.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from common.adapter import adapter, compact
from common.adapter.adapter import Tensors
from common.errors import ModelError, ProtocolError, WireError
from common.frame import wire
from common.frame.records import ADAPTER, TensorSpec, from_head
from common.frame.wire import Frame
from common.run import packing
from common.run.schema.wire import WHOLE as WHOLE_DOWN
from common.run.schema.wire import WireConfig

WHOLE: Final = "whole"
STEP: Final = "step"
SAME: Final = "same"


@dataclass(frozen=True)
class Form:
    """What a request's body is.

    Attributes:
        form: `whole`: the adapter in float32; `step`: steps to be added to what is held, one after the other, each of
            the size that run and shapes say; `same`: nothing.
        sha256: Of the adapter that results.
        base_sha256: Of the adapter that the site must hold; empty for `whole`.
    """

    form: str
    sha256: str
    base_sha256: str


@dataclass(frozen=True)
class Held:
    """An adapter that a site has been sent, and its hash; the tensors are only read."""

    sha256: str
    tensors: Tensors


_KEPT: Final = weakref.WeakValueDictionary[str, Held]()


def kept_once(found: Held) -> Held:
    """An adapter whose hash was checked, as the one copy of this process: a thousand virtual sites hold it once."""
    return _KEPT.setdefault(found.sha256, found)


def stepped(base: Tensors, step: Tensors) -> dict[str, Tensor]:
    """The adapter after a step; the same float32 additions at both ends."""
    return {name: tensor + step[name] for name, tensor in base.items()}


def plain_body(kind: str, tensors: Tensors, settings: WireConfig) -> bytes:
    """The adapter as the body of a request, where it does not go down as steps."""
    if kind == "train" and settings.is_adapter_sparse:
        return compact.encode(tensors, dtype="float32", density=settings.down_density, draws=None, is_relative=True)
    return adapter.encode(tensors, dtype="float32")


def _read_plain(request: Frame, tensor_specs: Sequence[TensorSpec], settings: WireConfig) -> dict[str, Tensor]:
    """The adapter out of such a body."""
    if request.kind == "train" and settings.is_adapter_sparse:
        return compact.decode(request.body, tensor_specs, dtype="float32", density=settings.down_density)
    return adapter.decode(request.body, tensor_specs, dtype="float32")


def adapter_sha256(request: Frame) -> str:
    """Hash of the adapter that a request is about; of the body where that is the adapter, or a manifest."""
    told = request.head.get(ADAPTER)
    return str(told["sha256"]) if isinstance(told, dict) else request.body_sha256.hex()


def receive(
    request: Frame, tensor_specs: Sequence[TensorSpec], *, settings: WireConfig, held: Sequence[Held | None]
) -> Held:
    """The adapter that a request brings.

    Args:
        request: Its head's `adapter` and its body are read.
        held: Adapters that this site holds: what it was sent last, and what the run starts from.

    Raises:
        WireError: Malformed, or a form that the run does not send.
        ProtocolError: It builds on an adapter that this site does not hold.
        ModelError: Other tensors, or another adapter than the head says.
    """
    told = request.head.get(ADAPTER)
    if settings.is_adapter_sparse or (settings.down == WHOLE_DOWN and told is None):
        if told is not None:
            raise WireError("the adapter comes in a form of its own, and this run sends its largest values")
        return kept_once(Held(adapter_sha256(request), _read_plain(request, tensor_specs, settings)))
    if not isinstance(told, dict):
        raise WireError("the request does not say in which form the adapter comes")
    form = from_head(Form, told)
    if settings.down == WHOLE_DOWN and form.form != SAME:
        raise WireError(f"the adapter comes as '{wire.shown(form.form)}', and this run's wire.down is float32")
    found = _take(form, request.body, tensor_specs, settings=settings, held=held)
    if found.sha256 != form.sha256:
        raise ModelError("the adapter that results is not the one that the coordinator holds")
    return kept_once(found)


def _take(
    form: Form,
    body: wire.Bytes,
    tensor_specs: Sequence[TensorSpec],
    *,
    settings: WireConfig,
    held: Sequence[Held | None],
) -> Held:
    """The adapter by one of the three forms."""
    if form.form == WHOLE:
        if form.base_sha256:
            raise WireError("an adapter that comes whole builds on none")
        return _named(adapter.decode(body, tensor_specs, dtype="float32"))
    if form.form not in (STEP, SAME):
        raise WireError(f"no such form of an adapter: '{wire.shown(form.form)}'")
    base = next((known for known in held if known and known.sha256 == form.base_sha256), None)
    if base is None:
        raise ProtocolError("the adapter comes as a step from one that this site does not hold; send it whole")
    if form.form == SAME:
        if body:
            raise WireError(f"{len(body)} bytes where the adapter is the one that the site holds")
        return base
    size = packing.body_bytes(tensor_specs, dtype=settings.down, density=settings.down_density)
    if not body or len(body) % size or len(body) > max(size, adapter.encoded_size(tensor_specs, dtype="float32")):
        raise WireError(f"{len(body)} bytes of steps; a step of this run has {size}, and no steps outweigh the adapter")
    tensors = base.tensors
    for start in range(0, len(body), size):
        piece = body[start : start + size]
        step = compact.decode(piece, tensor_specs, dtype=settings.down, density=settings.down_density)
        tensors = stepped(tensors, step)
    return _named(tensors)


def _named(tensors: Tensors) -> Held:
    """Tensors under their hash."""
    return Held(adapter.digest(tensors), tensors)
