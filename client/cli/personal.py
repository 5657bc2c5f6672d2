"""The command by which a site takes the adapter that a personalised run has left with it."""

from pathlib import Path
from typing import Annotated

import typer

from client.cli.options import NodeFile
from common import cli


def export_adapter(
    node_file: NodeFile,
    run: Annotated[str, typer.Argument(help="Hash of the run, or how it begins.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="FOLDER")],
    json: cli.JsonOption = False,
) -> None:
    """Write this site's own adapter of a personalised run as a peft folder.

    It is the adapter that was scored here last. Half of it never left this site: whoever gets the folder learns from it
    what only this site's rows taught.

    \b
    Examples:
      silotune-client export-adapter node.toml 3f9c2a71be04 own-adapter
    """
    from common.run import config

    node = config.load_node(node_file)  # told before torch is loaded

    from client.agent import process

    num_rounds = process.make_shelf(node).export(run, folder)
    result = {"adapter": str(folder), "num_rounds": num_rounds}
    cli.emit(result, as_json=json, show=lambda: cli.show(f"{folder}: this site's adapter after {num_rounds} rounds"))
