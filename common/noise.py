"""The only source of noise: AES-256 in counter mode under a key from the operating system; a seeded twin for tests.

A generator for statistics (`torch.randn`, `numpy.random`) can be predicted from a few of its outputs, so noise of it
protects nothing. Bits are made on the host and become normal values in float64 on the device that needs them.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

KEY_BYTES: Final = 32
GRID_BITS: Final = 10
CHUNK_PAIRS: Final = {"cpu": 1 << 16, "cuda": 1 << 20}  # what fits a cache; what keeps a GPU busy while AES runs
_PIECE: Final = bytes(1 << 20)
_BLOCK_BYTES: Final = 16
_MASK_53: Final = (1 << 53) - 1
_UNIT: Final = 2.0**-53

Read = Callable[[int], bytearray]


class Noise(Protocol):
    """Where noise and the sampling of units come from."""

    def normal(self, size: int, *, device: torch.device) -> Tensor:
        """Independent standard normal values, (size,), float64, on `device`."""

    def uniform(self, size: int) -> np.ndarray:
        """Independent values in [0, 1), (size,), float64, all 53 bits random."""


class SystemNoise:
    """Noise that nobody can predict: a fresh key from the operating system for every instance and every process.

    No noise comes twice, for then it could be cancelled: a copy goes on with the same stream, a forked process takes a
    key of its own, and it cannot be pickled.
    """

    def __init__(self) -> None:
        self._renew()

    def normal(self, size: int, *, device: torch.device) -> Tensor:
        """See `Noise.normal`."""
        return _normal(self._own(), size, device)

    def uniform(self, size: int) -> np.ndarray:
        """See `Noise.uniform`."""
        return _uniform(self._own(), size)

    def _renew(self) -> None:
        """Take a new key."""
        self._process = os.getpid()
        self._read = stream(os.urandom(KEY_BYTES))

    def _own(self) -> Read:
        """The stream of this process."""
        if self._process != os.getpid():
            self._renew()
        return self._read


class SeededNoise:
    """The same generator with a key that a seed gives: for tests and simulations, where nobody is to be protected.

    Args:
        seed: Equal seeds give equal noise.
    """

    def __init__(self, seed: int) -> None:
        self._read = stream(hashlib.sha256(b"silotune/v1/seeded-noise\0%d" % seed).digest())

    def normal(self, size: int, *, device: torch.device) -> Tensor:
        """See `Noise.normal`; the same on every device, to the rounding of its logarithm and cosine."""
        return _normal(self._read, size, device)

    def uniform(self, size: int) -> np.ndarray:
        """See `Noise.uniform`."""
        return _uniform(self._read, size)


def stream(key: bytes, *, counter: bytes = bytes(_BLOCK_BYTES)) -> Read:
    """Random bytes: the key stream of AES-256 in counter mode.

    Args:
        key: 32 bytes.
        counter: The first counter block.

    Returns:
        A function that gives the next so many bytes.

    Source: NIST SP 800-38A, section 6.5.
    """
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()

    def read(num_bytes: int) -> bytearray:
        buffer = bytearray(num_bytes + _BLOCK_BYTES)
        view = memoryview(buffer)
        for start in range(0, num_bytes, len(_PIECE)):
            piece = memoryview(_PIECE)[: num_bytes - start]
            encryptor.update_into(piece, view[start : start + len(piece) + _BLOCK_BYTES])
        view.release()
        del buffer[num_bytes:]
        return buffer

    return read


def to_grid(values: Tensor, *, clip_norm: float) -> Tensor:
    """Round noised values to multiples of 2^-10 of the clip norm.

    The floating-point numbers that a sum can hit tell something about its private part; those of a fixed grid do not.

    Args:
        values: A sum after noise was added, any shape.
        clip_norm: The norm to which the summed units were clipped.

    Returns:
        A new tensor of the same type.

    Raises:
        ValueError: `clip_norm` is not positive.

    Source: Mironov 2012, "On significance of the least significant bits for differential privacy".

    Example:
        >>> to_grid(torch.tensor([0.30001, -1.0]), clip_norm=1.0) * 1024
        tensor([  307., -1024.])
    """
    if not clip_norm > 0:
        raise ValueError("clip_norm must be above 0")
    step = clip_norm * 2.0**-GRID_BITS
    return (torch.round(values.double() / step) * step).to(values.dtype)


def _normal(read: Read, size: int, device: torch.device) -> Tensor:
    """Pairs of normal values from pairs of words, some at a time; where it is cut changes nothing.

    Source: Box and Muller 1958.
    """
    num_pairs = (size + 1) // 2
    values = torch.empty((num_pairs, 2), dtype=torch.float64, device=device)
    step = CHUNK_PAIRS.get(device.type, CHUNK_PAIRS["cpu"])
    for start in range(0, num_pairs, step):
        part = values[start : start + step]
        words = torch.frombuffer(read(16 * len(part)), dtype=torch.int64).to(device).bitwise_and_(_MASK_53).view(-1, 2)
        radius = words[:, 0].add(1).double().mul_(_UNIT).log_().mul_(-2).sqrt_()
        angle = words[:, 1].double().mul_(_UNIT * 2 * torch.pi)
        torch.mul(radius, angle.cos(), out=part[:, 0])
        torch.mul(radius, angle.sin_(), out=part[:, 1])
    return values.view(-1)[:size]


def _uniform(read: Read, size: int) -> np.ndarray:
    """The upper 53 bits of each word."""
    return (np.frombuffer(read(8 * size), dtype="<u8") >> np.uint64(11)).astype(np.float64) * _UNIT
