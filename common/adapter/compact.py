"""Updates in few bytes: integers with a scale a row, and the largest values only; what a body is: `common.run.packing`.

    scale = max |x| / L over a row, rounded up to bfloat16;    q = floor(x / scale + u),  u uniform on [0, 1)

so that E[q scale] = x and a value's variance is at most scale^2 / 4. Source: Alistarh et al. 2017, arXiv:1610.02132,
section 3, with the largest value of a row in place of its norm; sparse updates: Stich et al. 2018, arXiv:1809.07599.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import WireError
from common.frame import wire
from common.frame.records import TensorSpec
from common.run import packing
from common.run.schema.wire import WireConfig

Vector = NDArray[np.float32]
Codes = NDArray[np.uint8]
CHUNK: Final = 1 << 19  # values that are packed at a time; a multiple of 8, so that every chunk is whole bytes


def dice(*parts: str | int) -> np.random.Generator:
    """The draws of one rounding: a function of run, site and round, so that a round asked again gives the same bytes.

    Rounding with them comes after the noise of a private run, and needs no secret.
    """
    digest = hashlib.sha256(wire.canonical_json(["rounding", *parts])).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def encode_update(tensors: Tensors, settings: WireConfig, *, draws: np.random.Generator) -> bytes:
    """What goes up, as a run's `[wire]` says; `decode_update` reads it."""
    if packing.is_plain(settings.dtype, settings.density):
        return adapter.encode(tensors, dtype=settings.dtype)  # type: ignore[arg-type]
    return encode(tensors, dtype=settings.dtype, density=settings.density, draws=draws)


def decode_update(data: wire.Bytes, tensor_specs: Sequence[TensorSpec], settings: WireConfig) -> dict[str, Tensor]:
    """What came up, after its size was found to be exactly what run and shapes say.

    Plain tensors stay in the type that they crossed in, so that a bfloat16 update takes half the memory until it is
    added up; all others are float32.

    Raises:
        WireError: Malformed.
        ModelError: Names or shapes differ, or a value is not finite or too large.
    """
    if packing.is_plain(settings.dtype, settings.density):
        return adapter.load(data, tensor_specs, dtype=settings.dtype)  # type: ignore[arg-type]
    return decode(data, tensor_specs, dtype=settings.dtype, density=settings.density)


def encode(
    tensors: Tensors,
    *,
    dtype: str,
    density: float = 1.0,
    draws: np.random.Generator | None,
    is_relative: bool = False,
) -> bytes:
    """Tensors as a compressed body.

    Args:
        density: Share of the values that travel, the largest of all tensors together.
        draws: Of stochastic rounding; None rounds to nearest, which is biased.
        is_relative: Whether a value is large by its share of the largest in its rank direction, not by itself.
    """
    rows = [_rows(tensors[name]) for name in sorted(tensors)]
    is_sent = _largest([_relative(matrix) for matrix in rows] if is_relative else rows, density)
    mask = np.packbits(is_sent).tobytes() if density < 1 else b""
    if dtype in packing.FLOAT_BYTES:
        return mask + _float_bytes(_flat(rows)[is_sent], dtype)
    scales, codes = _quantise(rows, is_sent, dtype=dtype, draws=draws)
    return b"".join((mask, scales.tobytes(), *_packed(codes[is_sent], packing.BITS[dtype])))


def decode(
    data: wire.Bytes, tensor_specs: Sequence[TensorSpec], *, dtype: str, density: float = 1.0
) -> dict[str, Tensor]:
    """A compressed body as float32 tensors; a value that was not sent is 0.

    Raises:
        WireError: Another size; another number of values than the density says; bits set where there is no value; an
            integer that no rounding gives; a scale that is negative, NaN or infinite, or zero above values.
        ModelError: A value is not finite or too large.
    """
    sizes = packing.parts(tensor_specs, dtype=dtype, density=density)
    if len(data) != sum(sizes):
        raise WireError(f"compressed update of {len(data)} bytes; its tensors have {sum(sizes)} as {dtype}")
    mask, scales, values = data[: sizes[0]], data[sizes[0] : sizes[0] + sizes[1]], data[sizes[0] + sizes[1] :]
    ordered = sorted(tensor_specs, key=lambda spec: spec.name)
    num_values = sum(math.prod(spec.shape) for spec in ordered)
    is_sent = _read_mask(mask, num_values, packing.num_sent(num_values, density)) if density < 1 else None
    if dtype in packing.FLOAT_BYTES:
        flat = _spread(_floats(values, dtype), is_sent, 0)
        tensors = _split(flat, ordered)
    else:
        num_sent = packing.num_sent(num_values, density)
        codes = _unpacked(values, packing.BITS[dtype], num_sent, limit=2 * packing.largest(dtype))
        tensors = _scaled(_spread(codes, is_sent, packing.largest(dtype)), scales, ordered, dtype=dtype)
    adapter.check_values(tensors, what="received update")
    return tensors


def _rows(tensor: Tensor) -> Vector:
    """A tensor as rows, its shorter axis first."""
    matrix = tensor.detach().to(torch.float32).numpy()
    if matrix.ndim == 2 and matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    return np.ascontiguousarray(matrix).reshape(packing.matrix_shape(tensor.shape))


def _flat(rows: list[Vector]) -> Vector:
    """All values, one after the other."""
    return np.concatenate([matrix.ravel() for matrix in rows])


def _largest(rows: list[Vector], density: float) -> NDArray[np.bool_]:
    """Which values are the largest."""
    num_values = sum(matrix.size for matrix in rows)
    if density == 1.0:
        return np.ones(num_values, dtype=bool)
    is_sent = np.zeros(num_values, dtype=bool)
    num_left = num_values - packing.num_sent(num_values, density)
    is_sent[np.argpartition(np.abs(_flat(rows)), num_left)[num_left:]] = True
    return is_sent


def _relative(matrix: Vector) -> Vector:
    """Sizes as shares of their row's largest."""
    sizes: Vector = np.abs(matrix)
    largest = sizes.max(axis=1, keepdims=True)
    shares: Vector = np.divide(sizes, largest, out=np.zeros_like(sizes), where=largest > 0)
    return shares


def _quantise(
    rows: list[Vector], is_sent: NDArray[np.bool_], *, dtype: str, draws: np.random.Generator | None
) -> tuple[NDArray[np.uint16], Codes]:
    """The scales' bits, and every value's integer plus the largest one."""
    scales, codes, start = [], [], 0
    for matrix in rows:
        kept = np.where(is_sent[start : start + matrix.size].reshape(matrix.shape), matrix, np.float32(0))
        start += matrix.size
        bits = _scale_bits(np.abs(kept).max(axis=1) / packing.largest(dtype))
        scale = _from_bits(bits).astype(np.float64)[:, None]
        exact = np.divide(kept, scale, out=np.zeros(kept.shape), where=scale > 0)
        integers = np.rint(exact) if draws is None else np.floor(exact + draws.random(exact.shape))
        codes.append((integers + packing.largest(dtype)).astype(np.uint8).ravel())
        scales.append(bits)
    return np.concatenate(scales), np.concatenate(codes)


def _scale_bits(scale: Vector) -> NDArray[np.uint16]:
    """Not negative; rounded up to bfloat16, so that no value lies beyond the largest integer."""
    return ((scale.astype(np.float32).view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16).astype("<u2")


def _from_bits(bits: NDArray[np.uint16]) -> Vector:
    """Bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float_bytes(values: Vector, dtype: str) -> bytes:
    """Values as float32 or bfloat16, little-endian."""
    if dtype == "float32":
        return values.astype("<f4").tobytes()
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()


def _floats(data: wire.Bytes, dtype: str) -> Vector:
    """The way back."""
    return np.frombuffer(data, "<f4") if dtype == "float32" else _from_bits(np.frombuffer(data, "<u2"))


def _packed(codes: Codes, num_bits: int) -> list[bytes]:
    """Integers as bits, a chunk at a time."""
    chunks = (codes[start : start + CHUNK] for start in range(0, codes.size, CHUNK))
    return [np.packbits(np.unpackbits(chunk[:, None], axis=1)[:, 8 - num_bits :]).tobytes() for chunk in chunks]


def _unpacked(data: wire.Bytes, num_bits: int, num_values: int, *, limit: int) -> Codes:
    """Bits as integers, none above the limit and nothing behind them."""
    packed = np.frombuffer(data, np.uint8)
    num_left = 8 * len(packed) - num_bits * num_values  # behind the last value
    if num_left and int(packed[-1]) & ((1 << num_left) - 1):
        raise WireError("compressed update has bits set behind its last value")
    group = num_bits // math.gcd(num_bits, 8)  # bytes after which an integer begins with a byte again
    count = 8 * group // num_bits
    codes = packed.reshape(-1, 1) if count == 1 else np.empty((-(-num_values // count), count), np.uint8)
    for start in range(0, len(codes) if count > 1 else 0, CHUNK // count):
        part_gc = codes[start : start + CHUNK // count]
        given = packed[start * group : (start + len(part_gc)) * group]
        bytes_gb = np.pad(given, (0, len(part_gc) * group - len(given))).reshape(len(part_gc), group)
        value_g = bytes_gb[:, 0].astype(np.uint32)
        for byte in range(1, group):
            np.bitwise_or(value_g << np.uint32(8), bytes_gb[:, byte], out=value_g)
        for place in range(count):
            part_gc[:, place] = (value_g >> (num_bits * (count - 1 - place))) & ((1 << num_bits) - 1)
    flat: Codes = codes.reshape(-1)[:num_values]
    if num_values and int(flat.max()) > limit:
        raise WireError("compressed update holds an integer that no rounding gives")
    return flat


def _read_mask(data: wire.Bytes, num_values: int, num_sent: int) -> NDArray[np.bool_]:
    """Which values travel; exactly as many as the run says."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    found = int(bits.sum())
    if found != num_sent or bits[num_values:].any():
        raise WireError(f"mask of a sparse update marks {found} values, some perhaps beyond the last, not {num_sent}")
    return bits[:num_values].astype(bool)


def _spread(values: NDArray[np.generic], is_sent: NDArray[np.bool_] | None, rest: int) -> NDArray[np.generic]:
    """Values at their places, `rest` everywhere else."""
    if is_sent is None:
        return values
    whole = np.full(is_sent.size, rest, dtype=values.dtype)
    whole[is_sent] = values
    return whole


def _split(flat: NDArray[np.generic], ordered: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Values as tensors of their shapes."""
    tensors, start = {}, 0
    for spec in ordered:
        size = math.prod(spec.shape)
        tensors[spec.name] = _tensor(flat[start : start + size].astype(np.float32), spec)
        start += size
    return tensors


def _scaled(
    codes: NDArray[np.generic], scale_bytes: wire.Bytes, ordered: Sequence[TensorSpec], *, dtype: str
) -> dict[str, Tensor]:
    """Integers times their rows' scales."""
    bits = np.frombuffer(scale_bytes, "<u2")
    if (bits > _scale_bits(np.array([adapter.MAX_VALUE], np.float32))).any():  # negative and NaN too
        raise WireError("compressed update has a scale that is negative, NaN or too large")
    tensors, row, start = {}, 0, 0
    for spec in ordered:
        shape = packing.matrix_shape(spec.shape)
        scale = _from_bits(bits[row : row + shape[0]])[:, None]
        integers = codes[start : start + shape[0] * shape[1]].reshape(shape).astype(np.float32)
        integers -= packing.largest(dtype)
        if integers[scale[:, 0] == 0].any():
            raise WireError("compressed update has values under a scale of zero")
        integers *= scale
        tensors[spec.name] = _tensor(integers, spec)
        row, start = row + shape[0], start + shape[0] * shape[1]
    return tensors


def _tensor(values: Vector, spec: TensorSpec) -> Tensor:
    """Rows back as a tensor of its shape."""
    matrix = torch.from_numpy(values.reshape(packing.matrix_shape(spec.shape)))
    is_turned = len(spec.shape) == 2 and spec.shape[0] > spec.shape[1]
    return matrix.T.contiguous() if is_turned else matrix.reshape(spec.shape)
