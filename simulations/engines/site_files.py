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
COLUMNS: Final = ("instruction_column", "input_column", "output_column", "unit_column")
_NONE: Mapping[str, Sequence[str]] = {}
NO_ROWS: Mapping[str, Sequence[Mapping[str, Any]]] = {}


def write(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    data: config.DataConfig,
    folder: Path,
    base_folder: Path,
    log_folder: Path,
    num_threads: int,
    agent_lines: Mapping[str, Sequence[str]] = _NONE,
    held_out: Mapping[str, Sequence[Mapping[str, Any]]] = NO_ROWS,
    is_named: bool = False,
) -> list[Site]:
    """Write every site's folder: `rows.jsonl`, `node.toml` and where its agent's socket will be.

    Args:
        data: `[data]` of the run; a site's column names are taken from it.
        folder: Where to; short, as each agent's socket is in it, too.
        log_folder: A folder for each agent's own log is made in it.
        agent_lines: More lines for the `[agent]` section of a site, by its name.
        held_out: Rows by site that lie in a file of their own, `held_out.jsonl`; without one, the site splits `tables`.
        is_named: Whether a site's folder has its name; else its number, as a name may be long or no file's name.

    Returns:
        The sites, with the command that starts each one's agent.
    """
    columns = {key: getattr(data, key) for key in COLUMNS}
    # Rows of several files lie in one here, where an id that started anew in each of them would be there twice.
    unused = {read.ID_COLUMN} - set(columns.values())
    sites = []
    for number, (name, rows) in enumerate(sorted(tables.items())):
        site_folder = folder / (name if is_named else str(number))
        aside, more = held_out.get(name, ()), agent_lines.get(name, ())
        named = {"path": site_folder / ROWS, **columns, **({"held_out_path": site_folder / HELD_OUT} if aside else {})}
        lines = [
            *("[site]", f"name = {_quoted(name)}", "[data]", *(f"{key} = {_quoted(v)}" for key, v in named.items())),
            *("[model]", f"base = {_quoted(base_folder)}", "[hardware]", f"num_threads = {num_threads}"),
            *(
                "[agent]",
                f"socket = {_quoted(site_folder / SOCKET)}",
                f"log_folder = {_quoted(log_folder / name)}",
                *more,
            ),
        ]
        for path, part in ((site_folder / ROWS, rows), (site_folder / HELD_OUT, aside)):
            kept = ({key: value for key, value in row.items() if key not in unused} for row in part)
            if part:
                storage.write_atomic(path, "".join(json.dumps(row, default=str) + "\n" for row in kept).encode())
        storage.write_atomic(site_folder / NODE, "\n".join([*lines, ""]).encode())
        site_folder.chmod(0o700)
        sites.append(site_at(site_folder, name=name, has_policy=any(line.startswith("policy = ") for line in more)))
    return sites


def site_at(folder: Path, *, name: str, has_policy: bool) -> Site:
    """The site whose files `write` left in a folder, with the command that starts its agent."""
    switches = () if has_policy else (UNGUARDED,)
    command = (sys.executable, "-m", "client.cli.app", "serve", *switches, str(folder / NODE))
    return Site(name=name, command=command, socket_path=folder / SOCKET)


def guarded(site: Site) -> Site:
    """The site, started with the policy that its file names by now."""
    return dataclasses.replace(site, command=tuple(part for part in site.command if part != UNGUARDED))


def _quoted(value: object) -> str:
    """A TOML string; JSON's escapes are valid in it."""
    return json.dumps(str(value))
