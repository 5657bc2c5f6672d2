"""How the global adapter goes down: whole, as the step from the one that a site holds, or as its hash alone.

Where `wire.down` is not float32 a request's head says which under `adapter`, with the hash of what the site must then
hold; a site that comes to another hash does nothing. So coordinator and site hold the same adapter, bit by bit.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from common import adapter, compact, wire
from common.adapter import Tensors
from common.config_wire import WireConfig
from common.errors import ModelError, ProtocolError, WireError
from common.records import ADAPTER, TensorSpec, from_head
from common.wire import Frame

WHOLE: Final = "whole"
STEP: Final = "step"
SAME: Final = "same"


@dataclass(frozen=True)
class Form:
    """What a request's body is.

    Attributes:
        form: `whole`: the adapter in float32; `step`: to be added to what is held; `same`: nothing.
        sha256: Of the adapter that results.
        base_sha256: Of the adapter that the site must hold; empty for `whole`.
    """

    form: str
    sha256: str
    base_sha256: str


@dataclass(frozen=True)
class Held:
    """An adapter that a site has been sent, and its hash."""

    sha256: str
    tensors: Tensors


def digest(tensors: Tensors) -> str:
    """SHA-256 of an adapter's canonical float32 bytes."""
    return adapter.digest(tensors)


def stepped(base: Tensors, step: Tensors) -> dict[str, Tensor]:
    """The adapter after a step; the same float32 additions at both ends."""
    return {name: tensor + step[name] for name, tensor in base.items()}


def adapter_sha256(request: Frame) -> str:
    """Hash of the adapter that a request is about; of the body where that is the adapter, or a manifest."""
    told = request.head.get(ADAPTER)
    return str(told["sha256"]) if isinstance(told, dict) else hashlib.sha256(request.body).hexdigest()


def receive(
    request: Frame, tensor_specs: Sequence[TensorSpec], *, settings: WireConfig, held: Sequence[Held | None]
) -> Held:
    """The adapter that a request brings.

    Args:
        request: Its head's `adapter` and its body are read.
        tensor_specs: What is sent in this run.
        settings: The run's `[wire]`.
        held: Adapters that this site holds: what it was sent last, and what the run starts from.

    Raises:
        WireError: Malformed, or `adapter` where the run sends all in float32.
        ProtocolError: It builds on an adapter that this site does not hold.
        ModelError: Other tensors, or another adapter than the head says.
    """
    if settings.down == "float32":
        if ADAPTER in request.head:
            raise WireError("the adapter comes as a step, and this run's wire.down is float32")
        return Held(adapter_sha256(request), adapter.decode(request.body, tensor_specs, dtype="float32"))
    told = request.head.get(ADAPTER)
    if not isinstance(told, dict):
        raise WireError("the request does not say in which form the adapter comes")
    form = from_head(Form, told)
    tensors = _take(form, request.body, tensor_specs, dtype=settings.down, held=held)
    if digest(tensors) != form.sha256:
        raise ModelError("the adapter that results is not the one that the coordinator holds")
    return Held(form.sha256, tensors)


def _take(
    form: Form, body: bytes, tensor_specs: Sequence[TensorSpec], *, dtype: str, held: Sequence[Held | None]
) -> dict[str, Tensor]:
    """The adapter by one of the three forms."""
    if form.form == WHOLE:
        if form.base_sha256:
            raise WireError("an adapter that comes whole builds on none")
        return adapter.decode(body, tensor_specs, dtype="float32")
    if form.form not in (STEP, SAME):
        raise WireError(f"no such form of an adapter: '{wire.shown(form.form)}'")
    base = next((known for known in held if known and known.sha256 == form.base_sha256), None)
    if base is None:
        raise ProtocolError("the adapter comes as a step from one that this site does not hold; send it whole")
    if form.form == STEP:
        return stepped(base.tensors, compact.decode(body, tensor_specs, dtype=dtype))
    if body:
        raise WireError(f"{len(body)} bytes where the adapter is the one that the site holds")
    return dict(base.tensors)
