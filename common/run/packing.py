"""How large a compressed body is: rows, bits and counts follow from shapes and settings alone. Loads no torch.

A body that is not plain safetensors is, in this order, each part where it applies:

    mask       one bit a value, most significant first, padded to a byte: which values travel (`density` below 1)
    scales     one bfloat16 a row, little-endian (integers only)
    values     of those that travel, in the mask's order: float32 or bfloat16, little-endian, or integers of 3, 4 or 8
               bits, each plus its largest, packed most significant bit first and padded to a byte

Tensors follow each other by name, each with its shorter axis first: a row is one of an adapter's rank directions. So
the size of a body is known before it comes, and an index can be neither doubled nor out of range.
"""

import math
from collections.abc import Sequence
from typing import Final

from common.frame.records import TensorSpec

BITS: Final = {"int8": 8, "int4": 4, "int3": 3}
FLOAT_BYTES: Final = {"float32": 4, "bfloat16": 2}
SCALE_BYTES: Final = 2
MAX_HEADER_BYTES: Final = 1 << 20  # of a safetensors body


def largest(dtype: str) -> int:
    """Largest integer that a value is rounded to; the smallest is its negative.

    Example:
        >>> largest("int8"), largest("int4"), largest("int3")
        (127, 7, 3)
    """
    return int(2 ** (BITS[dtype] - 1)) - 1


def is_plain(dtype: str, density: float) -> bool:
    """Whether a body is safetensors, with every value as a float."""
    return dtype in FLOAT_BYTES and density == 1.0


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor, its shorter axis first; one that is no matrix is one row.

    Example:
        >>> matrix_shape((64, 8)), matrix_shape((8, 64)), matrix_shape((5,))
        ((8, 64), (8, 64), (1, 5))
    """
    return (min(shape), max(shape)) if len(shape) == 2 else (1, math.prod(shape))


def num_sent(num_values: int, density: float) -> int:
    """How many of so many values travel."""
    return math.ceil(density * num_values)


def parts(tensor_specs: Sequence[TensorSpec], *, dtype: str, density: float) -> tuple[int, int, int]:
    """Bytes of mask, scales and values of a compressed body."""
    num_values = sum(math.prod(spec.shape) for spec in tensor_specs)
    num_rows = sum(matrix_shape(spec.shape)[0] for spec in tensor_specs)
    sent = num_sent(num_values, density)
    mask = math.ceil(num_values / 8) if density < 1 else 0
    if dtype in FLOAT_BYTES:
        return mask, 0, sent * FLOAT_BYTES[dtype]
    return mask, num_rows * SCALE_BYTES, math.ceil(sent * BITS[dtype] / 8)


def body_bytes(tensor_specs: Sequence[TensorSpec], *, dtype: str, density: float) -> int:
    """Exact bytes of a compressed body; of a plain one the values', its header excluded.

    Example:
        >>> body_bytes([TensorSpec("q.lora_A.weight", (8, 64))], dtype="int4", density=1.0)
        272
    """
    return sum(parts(tensor_specs, dtype=dtype, density=density))
