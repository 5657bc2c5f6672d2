"""A run's folder: what lies in it, how it begins, and what it says without a model being loaded.

The commands that look at a run import this and not `server.run.run`, which loads torch.
"""

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Final

from common import cli, events, extras, storage
from common.errors import ConfigError, DataError, RunBusyError, SilotuneError, StorageError
from common.event_kinds import RunFailed
from common.events import EventLog
from common.run import config
from common.run.manifest import RunManifest, parse
from server.folder import begun, lock

RUN_FILE: Final = "run.json"
MANIFEST_FILE: Final = "manifest.json"
NODES_FILE: Final = "nodes.json"  # names of nodes, by their numbers
EXPORT_FOLDER: Final = "adapter"
RECORD_FILE: Final = "round.json"  # of a checkpoint, written last


def prepare(
    settings: config.RunConfig, folder: Path, *, resume: bool = False, start: begun.Begun | None = None
) -> EventLog:
    """Make the run's folder and write the resolved run file into it.

    Args:
        settings: Resolved.
        folder: The run's.
        resume: Go on with the run that is there.
        start: How the run is begun, for whoever resumes it; None: by no command.

    Raises:
        ConfigError: The folder holds a run already and `resume` is off, or it holds another run; which settings differ
            is told.
        DataError: `resume` is on and there is nothing to go on from.
        RunBusyError: A process is at work on this very run.
    """
    path = folder / RUN_FILE
    resolved = config.resolved_json(settings).encode() + b"\n"
    if path.exists() and not resume:
        raise ConfigError(f"{folder}: holds a run already; give another output folder, or --resume to go on")
    if resume and not path.exists():
        raise DataError(f"{folder}: no run to resume here; leave --resume out")
    if resume and path.read_bytes() != resolved:
        differing = begun.differences(path.read_bytes(), resolved)
        raise ConfigError(
            f"{folder}: holds a run with other settings: {differing}; resume it with its own run file and without --set"
        )
    lock.require_free(folder)
    storage.write_atomic(path, resolved)
    if start:
        begun.write(folder, start)
    return EventLog(folder / events.FILE)


def report_failure(log: EventLog, error: BaseException) -> str:
    """Write why a run ended early into its events, unless the disk is full or the run is another process' work.

    Args:
        log: The run's events.
        error: Its message is written if it is of our tree; else it could hold anything.

    Returns:
        A code: all that anybody else is told.
    """
    kind = type(error).__name__
    if isinstance(error, SilotuneError):
        code, reason, exit_code = kind, str(error), error.exit_code
    elif exit_code := cli.stop_code(error):
        code = kind = events.INTERRUPTED
        reason = "stopped by " + ("Ctrl-C" if exit_code == cli.INTERRUPTED else "SIGTERM")
    else:
        reason = f"internal error {kind}"
        if isinstance(error, ModuleNotFoundError):
            reason = extras.remedy(error.name or "") or reason
        code, exit_code = "InternalError", 1
    if isinstance(error, RunBusyError):
        return code
    with suppress(StorageError):
        log.append(RunFailed(error=kind, reason=reason, exit_code=exit_code))
    return code


def stored_settings(folder: Path) -> config.RunConfig:
    """The settings of a run folder.

    Raises:
        DataError: Not a run folder.
    """
    try:
        return config.RunConfig.model_validate(json.loads((folder / RUN_FILE).read_bytes()))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a run folder (no readable {RUN_FILE})") from error


def stored_manifest(folder: Path) -> RunManifest:
    """The manifest of a run folder, with the coordinator's own settings.

    Raises:
        DataError: Not a run folder, or the run has not begun.
        WireError: The manifest was changed.
    """
    try:
        public = parse((folder / MANIFEST_FILE).read_bytes())
    except OSError as error:
        raise DataError(f"{folder}: the run has not begun (no {MANIFEST_FILE})") from error
    return dataclasses.replace(public, run=stored_settings(folder))


def finished(folder: Path) -> list[int]:
    """Numbers of rounds after which a whole checkpoint lies in the folder, ascending."""
    names = (path.parent.name for path in folder.glob(f"rounds/*/{RECORD_FILE}"))
    return sorted(int(name) for name in names if name.isdecimal())
