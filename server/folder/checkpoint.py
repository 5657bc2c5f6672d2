"""Finished rounds on disk: an adapter that peft can read, and a small record written last."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from common import storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import DataError, ModelError
from common.frame import wire
from common.frame.records import TensorSpec
from server.folder import run_files

ADAPTER_FILE = "adapter_model.safetensors"
MEMORY_FILE = "optimizer.safetensors"


class DamagedError(ModelError):
    """A checkpoint is not what was written; an earlier one may be whole."""


@dataclass(frozen=True)
class Checkpoint:
    """The global adapter after `num_rounds` rounds, and what the coordinator's optimizer remembers."""

    num_rounds: int
    tensors: Tensors
    sha256: str
    memory: Tensors


def folder_of(run_folder: Path, num_rounds: int) -> Path:
    """Where the adapter after `num_rounds` rounds lies."""
    return run_folder / "rounds" / f"{num_rounds:05d}"


def save(run_folder: Path, tensors: Tensors, *, memory: Tensors, num_rounds: int, run_sha256: str) -> str:
    """Write a finished round; the record comes last, so a round without one does not count.

    Returns:
        SHA-256 of the adapter file.

    Raises:
        StorageError: Disk full or not writable; earlier rounds are untouched.
    """
    data = adapter.encode(tensors, dtype="float32")
    digest = hashlib.sha256(data).hexdigest()
    folder = folder_of(run_folder, num_rounds)
    storage.write_atomic(folder / ADAPTER_FILE, data)
    remembered = safetensors.torch.save(dict(memory)) if memory else b""
    if remembered:
        storage.write_atomic(folder / MEMORY_FILE, remembered)
    record = {
        "num_rounds": num_rounds,
        "adapter_sha256": digest,
        "memory_sha256": _digest(remembered),
        "run_sha256": run_sha256,
    }
    storage.write_atomic(folder / run_files.RECORD_FILE, wire.canonical_json(record) + b"\n")
    return digest


def load(run_folder: Path, specs: tuple[TensorSpec, ...], *, num_rounds: int, run_sha256: str) -> Checkpoint:
    """Read one checkpoint and hold it against its record.

    Raises:
        DataError: There is no such round.
        DamagedError: A file is missing, or not the one that was written.
        ModelError: It belongs to another run.
    """
    folder = folder_of(run_folder, num_rounds)
    try:
        record = json.loads((folder / run_files.RECORD_FILE).read_bytes())
        written = record["adapter_sha256"], record["memory_sha256"], record["run_sha256"]
        data = (folder / ADAPTER_FILE).read_bytes()
        memory = (folder / MEMORY_FILE).read_bytes() if record["memory_sha256"] else b""
    except (OSError, ValueError, TypeError, KeyError) as error:
        if (folder / run_files.RECORD_FILE).is_file():
            raise DamagedError(f"{folder}: the checkpoint cannot be read; use an earlier round") from error
        raise DataError(
            f"{folder}: no whole checkpoint; finished rounds are {run_files.finished(run_folder)}"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if written[2] != run_sha256:
        raise ModelError(f"{folder}: the adapter belongs to another run")
    if written != (digest, _digest(memory), run_sha256):
        raise DamagedError(f"{folder}: adapter differs from its record; use an earlier round")
    tensors = adapter.decode(data, specs, dtype="float32")
    return Checkpoint(num_rounds, tensors, digest, safetensors.torch.load(memory) if memory else {})


def newest(
    run_folder: Path, specs: tuple[TensorSpec, ...], *, run_sha256: str
) -> tuple[Checkpoint | None, list[DamagedError]]:
    """The newest whole checkpoint, None without any, and what is wrong with those that are newer.

    Raises:
        ModelError: It belongs to another run.
    """
    damaged: list[DamagedError] = []
    for num_rounds in reversed(run_files.finished(run_folder)):
        try:
            return load(run_folder, specs, num_rounds=num_rounds, run_sha256=run_sha256), damaged
        except DamagedError as error:
            damaged.append(error)
    return None, damaged


def set_aside(run_folder: Path, *, after: int) -> None:
    """Rename the checkpoints of later rounds than `after` to `NNNNN.damaged`, where they count no more.

    Raises:
        StorageError: It cannot be done.
    """
    for num_rounds in run_files.finished(run_folder):
        if num_rounds > after:
            folder = folder_of(run_folder, num_rounds)
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                folder.rename(aside)
            except OSError as error:
                raise storage.storage_error(aside, error) from error


def prune(run_folder: Path, *, num_kept: int) -> None:
    """Remove all but the newest `num_kept` checkpoints; 0 keeps all."""
    for num_rounds in run_files.finished(run_folder)[:-num_kept] if num_kept else []:
        shutil.rmtree(folder_of(run_folder, num_rounds))


def _digest(memory: bytes) -> str:
    """SHA-256 of what the optimizer remembers; empty where there is none."""
    return hashlib.sha256(memory).hexdigest() if memory else ""
