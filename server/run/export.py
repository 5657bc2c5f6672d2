"""The sealed folder at a run's end, as `[export]` asks for it: written, verified, and told of in one event."""

import shutil
from pathlib import Path
from typing import Final

import torch

from common import event_kinds
from common.adapter import adapter
from common.errors import DataError, ModelError
from common.events import EventLog
from common.model import base as model
from common.model import loading
from common.model.base import Engine
from common.run.manifest import RunManifest
from common.trust import identity
from server.export import folder, perplexity, seal
from server.export.folder import NEED_BASE, Exported

FOLDER: Final = "export"


def check(manifest: RunManifest, engine: Engine) -> None:
    """Find out before the first round what would end the export after the last.

    Raises:
        AuthError: The key cannot be used.
        ConfigError: A format is impossible for this kind of adapter, base, rank or machine.
        DataError: The rows are missing or unusable.
        ModelError: A converter fails on a small model of this base's form.
    """
    from server.verify import rehearsal  # loads what reads every format, which a run without [export] does not need

    run = manifest.run
    asked = run.export
    if not asked.formats:
        return
    source = Exported(engine.initial, manifest, 0, {}, [])
    formats = [name for name in seal.FORMATS if name in asked.formats]
    order = rehearsal.Order(formats, _path(asked.llama_cpp), asked.gguf_type)
    folder.check(source, formats=formats, base=engine.folder, llama_cpp=order.llama_cpp, gguf_type=order.gguf_type)
    if asked.operator_key:
        identity.load(Path(asked.operator_key).expanduser())
    if asked.rows and not where_there(asked.rows):
        raise DataError(f"export.rows = {asked.rows!r}: there is no such file")
    if (rows := _rows(source)) and folder.NEED_BASE & set(formats):
        model.encode(engine, loading.rows_of(str(rows), run.data)[: perplexity.MAX_ROWS], run.data)
    rehearsal.rehearse(run, engine.folder, base_sha256=engine.base_sha256, order=order)


def write(run_folder: Path, source: Exported, *, base: Path, log: EventLog) -> None:
    """Export an adapter that may be exported; nothing without `[export]`.

    The folder is made anew if it is there: a run that goes on may have chosen another adapter.

    Args:
        run_folder: Gets the folder `export`.
        source: What to export.
        base: The base's folder.
        log: Gets one event `exported`: `folder`, `adapter_sha256`, and all that `server.verify.verify` found.

    Raises:
        ConfigError: A format is impossible for this base, rank or machine.
        ModelError: Merged weights are not as good as side by side, or the folder is not sound; it is removed.
        StorageError: Disk full or not writable.
    """
    from server.verify import verify  # loads what reads every format, which a run without [export] does not need

    asked = source.run_manifest.run.export
    if not asked.formats:
        return
    formats = [name for name in seal.FORMATS if name in asked.formats]
    place = run_folder / FOLDER
    shutil.rmtree(place, ignore_errors=True)
    with torch.random.fork_rng():
        folder.write(
            place, source, formats=formats, base=base, llama_cpp=_path(asked.llama_cpp),
            key=identity.load(Path(asked.operator_key).expanduser()) if asked.operator_key else None,
            gguf_type=asked.gguf_type, rows=_rows(source) if NEED_BASE & set(formats) else None,
        )  # fmt: skip
        try:
            found = verify.verify(place, base=base if {"peft", "vllm"} & set(formats) else None)
        except ModelError:
            shutil.rmtree(place, ignore_errors=True)
            raise
    log.append(event_kinds.Exported(folder=FOLDER, adapter_sha256=adapter.digest(source.tensors), **found))


def _rows(source: Exported) -> Path | None:
    """Rows of `[export]`, or the coordinator's held-out ones where they are there."""
    run = source.run_manifest.run
    return where_there(run.export.rows or run.evaluation.server_data)


def where_there(named: str) -> Path | None:
    """A file that a run file names, if it is there."""
    return Path(named) if named and Path(named).expanduser().exists() else None


def _path(text: str) -> Path | None:
    """A path, if there is one."""
    return Path(text).expanduser() if text else None
