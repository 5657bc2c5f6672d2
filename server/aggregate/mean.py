"""The weighted mean of uploads: all that a linear method uses of them. U uploads, C values of a chunk.

A site of a smaller rank did not move what it does not hold: its upload counts as zero there.
"""

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from common.adapter import ranks
from server.aggregate.method import State, Sum

CHUNK: Final = 1 << 16  # values, so that what is made of them stays in the processor's cache


class WeightedMean:
    """Mean of uploads in float64, a few at a time, so that memory does not grow with their number.

    Uploads wait until they take as much memory as the sums, four in bfloat16 or two in float32, so that the sums cross
    memory less often.

    Float64 leaves 29 bits beyond float32's precision, so the rounded result does not depend on the order of arrival but
    for a chance of about 2^-29 a value.
    """

    def __init__(self, state: State) -> None:
        self._sums = {
            name: torch.zeros_like(tensor, dtype=torch.float64, memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
        self._total, self._num_waiting_bytes = 0.0, 0
        self._waiting: list[tuple[float, State]] = []

    def add(self, upload: State, *, weight: float) -> None:
        """Add `weight` times an upload.

        Raises:
            ValueError: The weight is not positive.
        """
        if not weight > 0:
            raise ValueError(f"weight {weight} is not positive")
        self._total += weight
        whole = ranks.padded(upload, self._sums)
        self._waiting.append((weight, whole))
        self._num_waiting_bytes += sum(tensor.nbytes for tensor in whole.values())
        if self._num_waiting_bytes >= sum(total.nbytes for total in self._sums.values()):
            self._flush()

    def result(self) -> dict[str, Tensor]:
        """The mean, float32; it takes the place of the sums, so ask once.

        Raises:
            ValueError: Nothing was added, or it was asked for before.
        """
        if not self._total:
            raise ValueError("no upload was added")
        self._flush()
        divisor, self._total = self._total, 0.0
        return {name: _in_place(self._sums.pop(name), divisor) for name in list(self._sums)}

    def sums(self) -> dict[str, Tensor]:
        """The weighted sums so far, float64; zeros if nothing was added."""
        self._flush()
        return self._sums

    def _flush(self) -> None:
        """Add the uploads that wait to the sums."""
        if not self._waiting:
            return
        weights_u = torch.tensor([weight for weight, _ in self._waiting], dtype=torch.float64)
        buffer = torch.empty(len(self._waiting) * CHUNK, dtype=torch.float64)
        for name, total in self._sums.items():
            pieces = [_chunks(upload[name].flatten()) for _, upload in self._waiting]
            for sum_c, *values in zip(_chunks(total.view(-1)), *pieces, strict=True):
                rows_uc = buffer[: len(values) * len(sum_c)].view(len(values), -1)
                for row_c, value_c in zip(rows_uc, values, strict=True):
                    row_c.copy_(value_c)
                sum_c.addmv_(rows_uc.T, weights_u)
        self._waiting.clear()
        self._num_waiting_bytes = 0


def _in_place(total: Tensor, divisor: float) -> Tensor:
    """A sum over a number, rounded to float32 once, in the first half of the sum's own memory.

    A chunk is read before anything is written where it was: the quotients need half of the place.
    """
    found = total.view(-1).view(torch.float32)[: total.numel()]
    for to_c, sum_c in zip(_chunks(found), _chunks(total.view(-1)), strict=True):
        to_c.copy_(sum_c / divisor)
    return found.view(total.shape)


def _chunks(flat: Tensor) -> tuple[Tensor, ...]:
    """Pieces of a vector; most tensors are one, and a split costs as much as adding a thousand values."""
    return torch.split(flat, CHUNK) if len(flat) > CHUNK else (flat,)


def start(state: State, *, trained: Collection[str]) -> Sum:
    """Begin a round."""
    return WeightedMean({name: state[name] for name in trained})


def add(state: State, combined: State) -> State:
    """Add the mean change to the tensors that were trained; the others stay."""
    return {name: tensor + combined[name] if name in combined else tensor for name, tensor in state.items()}
