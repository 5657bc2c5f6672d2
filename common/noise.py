"""The only source of noise: AES-256 in counter mode under a key from the operating system; a seeded twin for tests.

A generator for statistics (`torch.randn`, `numpy.random`) can be predicted from a few of its outputs, so noise of it
protects nothing. Bits are made on the host and become normal values in float64 on the device that needs them.
"""

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
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


class Noise(Protocol):
    """Where noise and the sampling of units come from."""

    def normal(self, size: int, *, device: torch.device) -> Tensor:
        """Independent standard normal values, (size,), float64, on `device`."""

    def uniform(self, size: int) -> np.ndarray:
        """Independent values in [0, 1), (size,), float64, all 53 bits random."""

    def prepare(self, size: int, *, device: torch.device) -> None:
        """Begin with the bits of the next `normal`, which must be of this size, beside whatever else is done."""


class Stream:
    """Random bytes in their order; the next ones may be made in a thread, as AES does not hold the interpreter.

    Args:
        fill: Writes the next bytes into a buffer that has a block to spare.
    """

    def __init__(self, fill: Callable[[memoryview, int], None]) -> None:
        self._fill = fill
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._maker: threading.Thread | None = None
        self._made: Tensor | None = None

    def __call__(self, num_bytes: int) -> Tensor:
        """The next bytes, uint8 on the host; valid until the next call.

        Raises:
            ValueError: Another number of bytes was prepared.
        """
        if self._maker is None:
            self._make(num_bytes, is_pinned=False)
        else:
            self._maker.join()
        made, self._maker, self._made = self._made, None, None
        if made is None or len(made) != num_bytes:
            raise ValueError(f"{num_bytes} bytes of noise wanted, and not so many were prepared")
        return made

    def prepare(self, num_bytes: int, *, is_pinned: bool) -> None:
        """Make the bytes of the next call in the background."""
        self._maker = threading.Thread(target=self._make, args=(num_bytes,), kwargs={"is_pinned": is_pinned})
        self._maker.start()

    def _make(self, num_bytes: int, *, is_pinned: bool) -> None:
        """Into one buffer that is used again; pinned memory reaches a GPU several times faster."""
        if len(self._buffer) < num_bytes + _BLOCK_BYTES or self._buffer.is_pinned() != is_pinned:
            self._buffer = torch.empty(num_bytes + _BLOCK_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
        self._fill(self._buffer.numpy().data, num_bytes)
        self._made = self._buffer[:num_bytes]


class _FromStream(ABC):
    """Noise out of a stream of random bytes."""

    @abstractmethod
    def _own(self) -> Stream:
        """The stream to read next."""

    def normal(self, size: int, *, device: torch.device) -> Tensor:
        """See `Noise.normal`; the same on every device, to the rounding of its logarithm and cosine."""
        return _normal(self._own(), size, device)

    def uniform(self, size: int) -> np.ndarray:
        """See `Noise.uniform`."""
        return _uniform(self._own(), size)

    def prepare(self, size: int, *, device: torch.device) -> None:
        """See `Noise.prepare`."""
        self._own().prepare(_normal_bytes(size), is_pinned=device.type == "cuda")


class SystemNoise(_FromStream):
    """Noise that nobody can predict: a fresh key from the operating system for every instance and every process.

    No noise comes twice, for then it could be cancelled: a copy goes on with the same stream, a forked process takes a
    key of its own, and it cannot be pickled.
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        """Take a new key."""
        self._process = os.getpid()
        self._read = stream(os.urandom(KEY_BYTES))

    def _own(self) -> Stream:
        """The stream of this process."""
        if self._process != os.getpid():
            self._renew()
        return self._read


class SeededNoise(_FromStream):
    """The same generator with a key that a seed gives: for tests and simulations, where nobody is to be protected.

    Args:
        seed: Equal seeds give equal noise.
    """

    def __init__(self, seed: int) -> None:
        self._read = stream(hashlib.sha256(b"silotune/v1/seeded-noise\0%d" % seed).digest())

    def _own(self) -> Stream:
        """The one stream."""
        return self._read


def stream(key: bytes, *, counter: bytes = bytes(_BLOCK_BYTES)) -> Stream:
    """Random bytes: the key stream of AES-256 in counter mode.

    Args:
        key: 32 bytes.
        counter: The first counter block.

    Source: NIST SP 800-38A, section 6.5.
    """
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()

    def fill(view: memoryview, num_bytes: int) -> None:
        for start in range(0, num_bytes, len(_PIECE)):
            piece = memoryview(_PIECE)[: num_bytes - start]
            encryptor.update_into(piece, view[start : start + len(piece) + _BLOCK_BYTES])

    return Stream(fill)


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


def added(tensors: Mapping[str, Tensor], *, noise_std: float, clip_norm: float, source: Noise) -> dict[str, Tensor]:
    """Independent noise on every value, rounded to the grid of the clip norm.

    Args:
        tensors: Sums of clipped values, any shapes.
        noise_std: Standard deviation of the noise on each value.
        clip_norm: The norm to which they were clipped.
        source: Of the noise.

    Returns:
        New tensors, float64, by ascending name.
    """
    return {
        name: to_grid(
            source.normal(values.numel(), device=values.device).view(values.shape).mul_(noise_std).add_(values),
            clip_norm=clip_norm,
        )
        for name, values in sorted(tensors.items())
    }


def _normal_bytes(size: int) -> int:
    """Bytes behind so many normal values: a pair of words for a pair of values."""
    return 16 * ((size + 1) // 2)


def _normal(read: Stream, size: int, device: torch.device) -> Tensor:
    """Pairs of normal values from pairs of words, some at a time; where it is cut changes nothing.

    Source: Box and Muller 1958.
    """
    words = read(_normal_bytes(size)).view(torch.int64).view(-1, 2)
    values = torch.empty(words.shape, dtype=torch.float64, device=device)
    step = CHUNK_PAIRS.get(device.type, CHUNK_PAIRS["cpu"])
    for start in range(0, len(words), step):
        part, drawn = values[start : start + step], words[start : start + step].to(device) & _MASK_53
        radius = drawn[:, 0].add(1).double().mul_(_UNIT).log_().mul_(-2).sqrt_()
        angle = drawn[:, 1].double().mul_(_UNIT * 2 * torch.pi)
        torch.mul(radius, angle.cos(), out=part[:, 0])
        torch.mul(radius, angle.sin_(), out=part[:, 1])
    return values.view(-1)[:size]


def _uniform(read: Stream, size: int) -> np.ndarray:
    """The upper 53 bits of each word."""
    words = read(8 * size).numpy().view("<u8")
    return (words >> np.uint64(11)).astype(np.float64) * _UNIT
