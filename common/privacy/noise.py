"""The only source of noise: AES-256 in counter mode under a key from the operating system; a seeded twin for tests.

A generator for statistics (`torch.randn`, `numpy.random`) can be predicted from a few of its outputs, so noise of it
protects nothing. Bits are made on the host and become discrete Gaussian values on the device that needs them.

What is released is a whole number of grid steps: what is protected is rounded to the grid before it is summed, sums of
whole numbers and whole noise are exact in float64, and so no rounding depends on anything private.
"""

import hashlib
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from common.privacy import discrete_gaussian

KEY_BYTES: Final = 32
GRID_BITS: Final = 30
ROUNDING_SHARE: Final = 2.0**-20  # of C: more than scaling in float32 and adding up to 10^8 sites in float64 can move
_PIECE: Final = bytes(1 << 20)
_BLOCK_BYTES: Final = 16
_UNIT: Final = 2.0**-53


class Noise(Protocol):
    """Where noise and the sampling of units come from."""

    def discrete(self, size: int, *, std: float, device: torch.device) -> Tensor:
        """Independent whole numbers that hide as much as normal noise of `std` steps, (size,), float64, on `device`."""

    def uniform(self, size: int) -> np.ndarray:
        """Independent values in [0, 1), (size,), float64, all 53 bits random."""

    def prepare(self, size: int, *, device: torch.device) -> None:
        """Begin with the bits of the next `discrete`, which must be of this size, beside whatever else is done."""

    def position(self) -> int:
        """How much was drawn, for `go_to`; 0 of noise that nobody may draw twice."""

    def go_to(self, position: int) -> None:
        """Go on as from this position; noise that nobody may draw twice goes on afresh."""


class Stream:
    """Random bytes in their order; the next ones may be made in a thread, as AES does not hold the interpreter.

    Args:
        fill: Writes the next bytes into a buffer that has a block to spare.
    """

    def __init__(self, fill: Callable[[memoryview, int], None]) -> None:
        self.num_bytes = 0
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
        self.num_bytes += num_bytes
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

    def discrete(self, size: int, *, std: float, device: torch.device) -> Tensor:
        """See `Noise.discrete` and `discrete_gaussian.sample`; the same on every device."""
        return discrete_gaussian.sample(self._own(), size, std=std, device=device)

    def uniform(self, size: int) -> np.ndarray:
        """See `Noise.uniform`."""
        words = self._own()(8 * size).numpy().view("<u8")
        return (words >> np.uint64(11)).astype(np.float64) * _UNIT  # the upper 53 bits of each word

    def prepare(self, size: int, *, device: torch.device) -> None:
        """See `Noise.prepare`."""
        num_bytes = discrete_gaussian.BYTES_PER_TRY * discrete_gaussian.num_tries(size)
        self._own().prepare(num_bytes, is_pinned=device.type == "cuda")


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

    def position(self) -> int:
        """Nowhere: its key must not outlive the process."""
        return 0

    def go_to(self, position: int) -> None:
        """Draw afresh."""

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
        self._key = hashlib.sha256(b"silotune/v1/seeded-noise\0%d" % seed).digest()
        self._read = stream(self._key)

    def position(self) -> int:
        """Bytes drawn so far."""
        return self._read.num_bytes

    def go_to(self, position: int) -> None:
        """Draw the bytes from there on."""
        block, rest = divmod(position, _BLOCK_BYTES)
        self._read = stream(self._key, counter=block.to_bytes(_BLOCK_BYTES, "big"))
        self._read(rest)
        self._read.num_bytes = position

    def _own(self) -> Stream:
        """The one stream."""
        return self._read


def stream(key: bytes, *, counter: bytes = bytes(_BLOCK_BYTES)) -> Stream:
    """Random bytes: the key stream of AES-256 in counter mode.

    Args:
        key: 32 bytes.

    Source: NIST SP 800-38A, section 6.5.
    """
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()

    def fill(view: memoryview, num_bytes: int) -> None:
        for start in range(0, num_bytes, len(_PIECE)):
            piece = memoryview(_PIECE)[: num_bytes - start]
            encryptor.update_into(piece, view[start : start + len(piece) + _BLOCK_BYTES])

    return Stream(fill)


def to_grid(values: Tensor, *, clip_norm: float) -> Tensor:
    """Values as whole numbers of grid steps, 2^-30 of the clip norm each, rounded towards zero.

    Rounded towards zero no vector becomes longer. The floating-point numbers that a noised sum can hit would tell
    something about its private part; whole numbers plus whole noise do not.

    Args:
        values: What is to be summed, any shape, no longer than some norms of `clip_norm`.
        clip_norm: C.

    Returns:
        Whole numbers, float64.

    Raises:
        ValueError: `clip_norm` is not positive.

    Source: Mironov 2012, "On significance of the least significant bits for differential privacy"; Casacuberta et al.
    2022, arXiv:2207.10635, on sums whose sensitivity rounding raises.

    Example:
        >>> to_grid(torch.tensor([0.75, -1.0]), clip_norm=1.0) / 2**30
        tensor([ 0.7500, -1.0000], dtype=torch.float64)
    """
    return torch.trunc(values.double() / grid_step(clip_norm))


def grid_step(clip_norm: float) -> float:
    """A step of the grid, in the unit of `clip_norm`.

    Raises:
        ValueError: `clip_norm` is not positive.
    """
    if not clip_norm > 0:
        raise ValueError("clip_norm must be above 0")
    return clip_norm * 2.0**-GRID_BITS


def added(tensors: Mapping[str, Tensor], *, noise_std: float, clip_norm: float, source: Noise) -> dict[str, Tensor]:
    """Independent noise on every value, on the grid of the clip norm.

    The sums are rounded to the grid here, so that one summand more or less moves them by up to a step a value beyond
    C, and their floating-point additions by less than that; the noise is made stronger by as much.

    Args:
        tensors: Sums of clipped values, any shapes.
        noise_std: Standard deviation of the noise on each value.
        clip_norm: The norm to which they were clipped.
        source: Of the noise.

    Returns:
        New tensors, float64, by ascending name.

    Privacy: that of a Gaussian mechanism with `noise_std` and L2 sensitivity `clip_norm`, one summand added or removed.
        Each call is one release and must be charged as one; noise of a `SeededNoise` protects nobody.
    """
    step = grid_step(clip_norm)
    num_values = sum(values.numel() for values in tensors.values())
    std = noise_std / step * (1 + ROUNDING_SHARE + math.sqrt(num_values) * 2.0**-GRID_BITS)
    return {
        name: source.discrete(values.numel(), std=std, device=values.device)
        .view(values.shape)
        .add_(to_grid(values, clip_norm=clip_norm))
        .mul_(step)
        for name, values in sorted(tensors.items())
    }
