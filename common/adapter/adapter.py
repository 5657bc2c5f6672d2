"""An adapter as named tensors, its shape list, and strict safetensors bytes."""

import hashlib
import json
import struct
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from common.adapter import cores
from common.errors import ModelError, WireError
from common.frame import wire
from common.frame.records import TensorSpec
from common.run.catalogue import kinds
from common.run.packing import MAX_HEADER_BYTES
from common.run.trainable import at_rank, factor_of

Tensors = Mapping[str, Tensor]
WireDtype = Literal["float32", "bfloat16"]

MAX_VALUE: Final = 1e6
SIDE: Final = "residual"  # peft's name of the side adapter
_CODES: Final = {"float32": "F32", "bfloat16": "BF16"}
_TORCH: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SIZES: Final = {"float32": 4, "bfloat16": 2}


def specs(tensors: Tensors) -> tuple[TensorSpec, ...]:
    """Names and shapes, sorted by name."""
    return tuple(TensorSpec(name, tuple(tensors[name].shape)) for name in sorted(tensors))


def module_names(tensor_specs: Sequence[TensorSpec]) -> list[str]:
    """The modules that the adapter touches, each once; empty for what stands before the input."""
    return sorted({kinds.module_of(spec.name) for spec in tensor_specs})


def num_parameters(tensor_specs: Sequence[TensorSpec]) -> int:
    """Number of values in all tensors."""
    return sum(torch.Size(spec.shape).numel() for spec in tensor_specs)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters under the names that peft saves them by; those of a core with its scales."""
    return {
        name.removesuffix(".default").replace(".default.", "."): parameter
        for name, parameter in sorted(model.named_parameters())
        if parameter.requires_grad
    }


@contextmanager
def training_only(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let only these of the adapter's tensors be trained; the others are as frozen as the base meanwhile.

    Raises:
        ModelError: The adapter has no such tensor.
    """
    own = parameters(model)
    if missing := sorted(set(names) - own.keys()):
        raise ModelError(f"the adapter has no tensor {wire.shown(missing[0], limit=200)} that could be trained")
    wanted = {*names, *map(cores.scale_beside, names)}
    frozen = [parameter for name, parameter in own.items() if name not in wanted]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def side_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen side adapter, `MODULE.residual_A.weight` and `MODULE.residual_B.weight`; empty where there is none."""
    return {
        name.replace(f".lora_{factor}.{SIDE}.", f".residual_{factor}."): parameter
        for name, parameter in sorted(model.named_parameters())
        for factor in "AB"
        if f".lora_{factor}.{SIDE}." in name
    }


def read(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter in a model, its side adapter included, float32 on the CPU; cores times their scales."""
    own = parameters(model) | side_parameters(model)
    return cores.folded({name: p.detach().to("cpu", torch.float32, copy=True) for name, p in own.items()})


@torch.no_grad()
def write(model: nn.Module, tensors: Tensors) -> None:
    """Put an adapter into a model; where it is of another rank than the model's, the model has that rank from then on.

    The scale of the product stays what it was at the rank that the model was loaded with. Scales of cores are 1 then.

    Raises:
        ModelError: Names or shapes differ from the model's adapter, ranks aside, or the modules' ranks differ.
    """
    held = parameters(model) | side_parameters(model)
    own = {name: parameter for name, parameter in held.items() if not cores.is_scale(name)}
    found = {tensor.shape[0] for name, tensor in tensors.items() if factor_of(name) == "A"}
    check_specs(specs(tensors), at_rank(specs(own), found.pop()) if len(found) == 1 else specs(own))
    if any(parameter.shape != tensors[name].shape for name, parameter in own.items()):
        own = _resized(model, own, tensors)
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
    for name in held.keys() - own.keys():
        held[name].fill_(1.0)


def _resized(model: nn.Module, own: Mapping[str, nn.Parameter], like: Tensors) -> dict[str, nn.Parameter]:
    """The adapter's parameters, with new ones in the model in place of those of another shape.

    Not new `.data`: autograd keeps a node per parameter while any graph that used it lives, and that node goes on
    expecting gradients of the old shape.
    """
    owners = {
        id(parameter): (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    resized = dict(own)
    for name, old in own.items():
        if old.shape != like[name].shape:
            resized[name] = nn.Parameter(old.new_empty(like[name].shape), requires_grad=old.requires_grad)
            setattr(*owners[id(old)], resized[name])
    return resized


def check_specs(found: Sequence[TensorSpec], expected: Sequence[TensorSpec]) -> None:
    """Refuse an adapter whose names or shapes differ.

    Raises:
        ModelError: Names the first tensor that differs.
    """
    difference = sorted(set(found) ^ set(expected), key=lambda spec: spec.name)
    if difference:
        name = difference[0].name
        sides = ({spec.name: spec.shape for spec in side}.get(name, "absent") for side in (found, expected))
        was, wanted = (wire.shown(shape) for shape in sides)
        tensor = wire.shown(name, limit=200)
        raise ModelError(f"adapter tensor {tensor}: found {was}, expected {wanted}; {len(difference)} differ")


def check_values(tensors: Tensors, *, what: str) -> None:
    """Refuse NaN, infinity and values that no training gives but that would overflow where updates are multiplied.

    Raises:
        ModelError: Names the first tensor.
    """
    for name, tensor in tensors.items():
        if tensor.numel() and not all(abs(float(value)) <= MAX_VALUE for value in torch.aminmax(tensor)):  # NaN shows
            raise ModelError(
                f"{what}: tensor {name} holds NaN, infinity or a value over {MAX_VALUE:g}; lower training.learning_rate"
            )


def encode(tensors: Tensors, *, dtype: WireDtype) -> bytes:
    """Tensors to safetensors bytes, rounded to `dtype`."""
    rounded = {name: tensors[name].to(_TORCH[dtype]).contiguous() for name in sorted(tensors)}
    return safetensors.torch.save(rounded)


def digest(tensors: Tensors) -> str:
    """SHA-256 of an adapter's float32 bytes: the name that logs and records know it by."""
    return hashlib.sha256(encode(tensors, dtype="float32")).hexdigest()


def encoded_size(tensor_specs: Sequence[TensorSpec], *, dtype: WireDtype) -> int:
    """Exact bytes of the tensors' values, header excluded."""
    return num_parameters(tensor_specs) * _SIZES[dtype]


def decode(data: wire.Bytes, tensor_specs: Sequence[TensorSpec], *, dtype: WireDtype) -> dict[str, Tensor]:
    """Safetensors bytes to float32 tensors of their own; checks and errors are those of `load`."""
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in load(data, tensor_specs, dtype=dtype).items()}


def load(data: wire.Bytes, tensor_specs: Sequence[TensorSpec], *, dtype: WireDtype) -> dict[str, Tensor]:
    """Safetensors bytes to tensors, after the header was found to say exactly what is expected.

    The tensors lie in the bytes themselves, copied only where values are not at multiples of their size: to be read
    and never written to.

    Args:
        dtype: The dtype that every tensor must have, and has here.

    Raises:
        WireError: Header too large or not strict JSON; gaps, overlaps or trailing bytes; another dtype.
        ModelError: Names or shapes differ, or a value is not finite or too large.
    """
    header = _parse_header(data)
    check_specs([TensorSpec(name, _shape(entry)) for name, entry in header.items()], tensor_specs)
    _check_layout(header, num_bytes=len(data) - 8 - _header_size(data), dtype=dtype)
    tensors = _views(data, header, dtype=dtype)
    check_values(tensors, what="received adapter")
    return tensors


def _views(data: wire.Bytes, header: dict[str, dict[str, Any]], *, dtype: WireDtype) -> dict[str, Tensor]:
    """The tensors of a header that was found right, in the bytes that they came in.

    The safetensors package would copy every tensor, which costs as much as adding twenty updates up.
    """
    values, tensors = np.frombuffer(data, np.uint8, offset=8 + _header_size(data)), {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, entry in header.items():
            part = values[slice(*entry["data_offsets"])]
            part = part.copy() if part.ctypes.data % _SIZES[dtype] else part
            tensors[name] = torch.from_numpy(part).view(_TORCH[dtype]).view(entry["shape"])
    return tensors


def _header_size(data: wire.Bytes) -> int:
    """Declared size of the safetensors header, checked against the data and the limit."""
    if len(data) < 8:
        raise WireError(f"adapter of {len(data)} bytes is too short for safetensors")
    size = int(struct.unpack_from("<Q", data)[0])
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise WireError(f"safetensors header declares {size} bytes; the limit is {MAX_HEADER_BYTES}")
    return size


def _parse_header(data: wire.Bytes) -> dict[str, dict[str, Any]]:
    """The header: an object of objects with exactly dtype, shape and data_offsets."""
    try:
        text = str(data[8 : 8 + _header_size(data)], "utf-8")
        header = json.loads(text, object_pairs_hook=wire.unique_pairs, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise WireError("safetensors header is not strict JSON") from error
    if not isinstance(header, dict):
        raise WireError("safetensors header is not an object")
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise WireError(
                f"safetensors entry '{wire.shown(name, limit=200)}' does not have exactly dtype, shape and data_offsets"
            )
    return header


def _integer(digits: str) -> int:
    """A JSON integer in its one form; Python takes -0 too."""
    if digits == "-0":
        raise ValueError("minus zero")
    return int(digits)


def _shape(entry: dict[str, Any]) -> tuple[int, ...]:
    """A shape of plain integers."""
    if not _is_integers(entry["shape"]):
        raise WireError("safetensors shape is not a list of integers")
    return tuple(entry["shape"])


def _is_integers(value: object) -> bool:
    """Whether a JSON value is a list of integers of at least 0."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(header: dict[str, dict[str, Any]], *, num_bytes: int, dtype: WireDtype) -> None:
    """Tensors must lie one after the other, each of its shape's size, from the first to the last byte."""
    end = 0
    offsets = [entry["data_offsets"] for entry in header.values()]
    if not all(_is_integers(pair) and len(pair) == 2 for pair in offsets):
        raise WireError("safetensors data_offsets is not a pair of integers")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        size = torch.Size(entry["shape"]).numel() * _SIZES[dtype]
        if entry["dtype"] != _CODES[dtype] or entry["data_offsets"] != [end, end + size]:
            raise WireError(
                f"safetensors entry '{wire.shown(name, limit=200)}' is not {size} bytes of {dtype} at offset {end}"
            )
        end += size
    if end != num_bytes:
        raise WireError(f"safetensors body has {num_bytes} bytes; its tensors have {end}")
