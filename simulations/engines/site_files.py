"""Virtual sites as files on disk, as real sites have them: rows, and a site's own file that says where they are."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from common import storage
from common.data import read
from common.run import config
from simulations.engines.deployment import Site

UNGUARDED: Final = "--without-policy"
ROWS: Final = "rows.jsonl"
HELD_OUT: Final = "held_out.jsonl"
NODE: Final = "node.toml"
SOCKET: Final = "agent.sock"
_NONE: Mapping[str, Sequence[str]] = {}
NO_ROWS: Mapping[str, Sequence[Mapping[str, Any]]] = {}


def write(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    settings: config.RunConfig,
    folder: Path,
    base_folder: Path,
    log_folder: Path,
    num_threads: int,
    agent_lines: Mapping[str, Sequence[str]] = _NONE,
    held_out: Mapping[str, Sequence[Mapping[str, Any]]] = NO_ROWS,
    is_named: bool = False,
) -> list[Site]:
    """Write every site's rows and own file.

    Args:
        tables: Rows by site.
        settings: The run; a site's column names are taken from it.
        folder: Where to; short, as each agent's socket is in it, too.
        base_folder: The base model's folder.
        log_folder: A folder for each agent's own log is made in it.
        num_threads: CPU threads of each agent.
        agent_lines: More lines for the `[agent]` section of a site, by its name.
        held_out: Rows by site that lie in a file of their own, `held_out.jsonl`; without one, the site splits `tables`.
        is_named: Whether a site's folder has its name; else its number, as a name may be long or no file's name.

    Returns:
        The sites, with the command that starts each one's agent.

    Raises:
        StorageError: Disk full or not writable.
    """
    sites = []
    for number, (name, rows) in enumerate(sorted(tables.items())):
        site = _write_site(
            name,
            rows,
            settings=settings,
            folder=folder / (name if is_named else str(number)),
            lines=_shared(base_folder, num_threads),
            log_folder=log_folder / name,
            agent_lines=agent_lines.get(name, ()),
            held_out=held_out.get(name, ()),
        )
        sites.append(site)
    return sites


def _write_site(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    settings: config.RunConfig,
    folder: Path,
    lines: Sequence[str],
    log_folder: Path,
    agent_lines: Sequence[str],
    held_out: Sequence[Mapping[str, Any]],
) -> Site:
    """One site's folder: `rows.jsonl`, `node.toml` and the place of the agent's socket."""
    data, rows_file = settings.data, folder / ROWS
    columns = ("instruction_column", "input_column", "output_column", "unit_column")
    named = [f"{column} = {_quoted(getattr(data, column))}" for column in columns]
    named += [f"held_out_path = {_quoted(folder / HELD_OUT)}"] if held_out else []
    text = [
        *("[site]", f"name = {_quoted(name)}", "[data]", f"path = {_quoted(rows_file)}", *named, *lines),
        *("[agent]", f"socket = {_quoted(folder / SOCKET)}", f"log_folder = {_quoted(log_folder)}"),
        *agent_lines,
    ]
    # Rows of several files lie in one here, where an id that started anew in each of them would be there twice.
    unused = {read.ID_COLUMN} - {getattr(data, column) for column in columns}
    for path, part in ((rows_file, rows), (folder / HELD_OUT, held_out)):
        kept = ({name: value for name, value in row.items() if name not in unused} for row in part)
        if part:
            storage.write_atomic(path, "".join(json.dumps(row, default=str) + "\n" for row in kept).encode())
    storage.write_atomic(folder / NODE, "\n".join([*text, ""]).encode())
    folder.chmod(0o700)
    has_policy = any(line.startswith("policy = ") for line in agent_lines)
    return site_at(folder, name=name, has_policy=has_policy)


def site_at(folder: Path, *, name: str, has_policy: bool) -> Site:
    """The site whose files `write` left in a folder, with the command that starts its agent."""
    switches = () if has_policy else (UNGUARDED,)
    command = (sys.executable, "-m", "client.cli.app", "serve", *switches, str(folder / NODE))
    return Site(name=name, command=command, socket_path=folder / SOCKET)


def guarded(site: Site) -> Site:
    """The site, started with the policy that its file names by now."""
    return dataclasses.replace(site, command=tuple(part for part in site.command if part != UNGUARDED))


def _shared(base_folder: Path, num_threads: int) -> list[str]:
    """What is the same in every site's own file."""
    return ["[model]", f"base = {_quoted(base_folder)}", "[hardware]", f"num_threads = {num_threads}"]


def _quoted(value: object) -> str:
    """A TOML string; JSON's escapes are valid in it."""
    return json.dumps(str(value))
