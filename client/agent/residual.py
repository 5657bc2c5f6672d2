"""What sparse updates of a run left out, kept at the site for its next one (error feedback).

    sent = Top(delta + residual),    residual <- delta + residual - sent

A file a round in which the site takes part: what that round begins with. The one that the last round began with stays,
so that a round that is asked again gives the same bytes. It is made from rows as an unprotected update is, and never
leaves.
Source: Stich et al. 2018, arXiv:1809.07599, algorithm 1.
"""

from collections.abc import Sequence
from pathlib import Path

from common import storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import DataError, ModelError, WireError
from common.frame.records import TensorSpec

MARK = ".safetensors"


def load(folder: Path, run_sha256: str, round_index: int, specs: Sequence[TensorSpec]) -> Tensors:
    """What a round begins with: all that leaves in some round of the run; empty before the first.

    Raises:
        DataError: The newest file is not whole, or cannot be read.
    """
    known = [number for number in _rounds(folder, run_sha256) if number <= round_index]
    if not known:
        return {}
    path = _place(folder, run_sha256, known[-1])
    try:
        return adapter.decode(path.read_bytes(), specs, dtype="float32")
    except (OSError, WireError, ModelError) as error:
        raise DataError(
            f"{path}: what the last sparse update left out cannot be read; remove the file to go on without it"
        ) from error


def save(folder: Path, run_sha256: str, round_index: int, tensors: Tensors) -> None:
    """Keep what this round left out for the next; on the disk when this returns.

    Raises:
        StorageError: It cannot be written; the update must not leave then.
    """
    storage.write_atomic(
        _place(folder, run_sha256, round_index + 1), adapter.encode(tensors, dtype="float32"), mode=storage.PRIVATE
    )
    began = [number for number in _rounds(folder, run_sha256) if number <= round_index]
    for number in began[:-1]:
        _place(folder, run_sha256, number).unlink()


def _rounds(folder: Path, run_sha256: str) -> list[int]:
    """Rounds whose beginning is kept, ascending."""
    return sorted(int(path.name[len(run_sha256) + 1 : -len(MARK)]) for path in folder.glob(f"{run_sha256}-*{MARK}"))


def _place(folder: Path, run_sha256: str, round_index: int) -> Path:
    """Where what a round begins with is kept."""
    return folder / f"{run_sha256}-{round_index:06d}{MARK}"
