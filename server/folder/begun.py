"""How a run was begun: what its command line changed, and the command that goes on with it; kept in the run's folder.

So `--resume` needs no `--set` a second time, and whoever finds an interrupted run is shown the command.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from common import cli, storage
from common.errors import DataError

FILE: Final = "begun.json"
GO_ON: Final = "go on with the command that began it, --output its folder and --resume"
_ABSENT: Final = object()


@dataclass(frozen=True)
class Begun:
    """The start of a run.

    Attributes:
        overrides: Settings that the command line changed, as `config.load` takes them.
        command: What goes on with the run, as words; empty where no command began it.
        cwd: The folder in which the command was given; its paths may be relative.
        base: Folder of the base, if the command named one.
    """

    overrides: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ()
    cwd: str = ""
    base: str = ""


def write(folder: Path, begun: Begun) -> None:
    """Keep it.

    Raises:
        StorageError: Disk full or not writable.
    """
    storage.write_atomic(folder / FILE, json.dumps(asdict(begun), indent=1).encode() + b"\n")


def read(folder: Path) -> Begun:
    """How the run of a folder was begun; an older release kept nothing.

    Raises:
        DataError: The file is there and is not what was written.
    """
    path = folder / FILE
    if not path.exists():
        return Begun()
    try:
        return Begun(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: is damaged; remove it, and repeat --set when you resume") from error


def go_on(folder: Path) -> str:
    """What to do about a run that was interrupted, with the command where it is known."""
    begun = read(folder)
    if not begun.command:
        return GO_ON
    elsewhere = "" if Path.cwd() == Path(begun.cwd) else f"cd {cli.quoted([begun.cwd])} && "
    return f"go on with: {elsewhere}{cli.quoted(begun.command)}"


def differences(stored: bytes, given: bytes) -> str:
    """The settings in which two resolved run files differ, with their values where these are numbers or switches.

    Example:
        >>> differences(b'{"seed": 1, "data": {"source": "a"}}', b'{"seed": 2, "data": {"source": "b"}}')
        'data.source, seed (1 there, 2 given)'
    """
    there, here = _flat(json.loads(stored)), _flat(json.loads(given))
    keys = [key for key in sorted(there | here) if there.get(key, _ABSENT) != here.get(key, _ABSENT)]
    return ", ".join(_difference(key, there.get(key), here.get(key)) for key in keys)


def _difference(key: str, there: Any, here: Any) -> str:
    """One of them; a text may be a prompt, and is not shown."""
    if isinstance(there, int | float) and isinstance(here, int | float):
        return f"{key} ({json.dumps(there)} there, {json.dumps(here)} given)"
    return key


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
