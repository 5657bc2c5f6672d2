"""`silotune-server polish`."""

from pathlib import Path
from typing import Annotated

import typer

from common import cli

RunFolder = Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN_FOLDER")]


def polish(
    run_folder: RunFolder,
    base: Annotated[Path | None, typer.Option(help="Folder of the base; default: model.base, in the store.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: every core.")] = 0,
    json: cli.JsonOption = False,
) -> None:
    """Play the stages of `polish` that a run has left.

    \b
    Examples:
      silotune-server polish runs/triage
    """
    from server import run_files

    run_files.stored_manifest(run_folder)  # told before torch is loaded

    from server.polish import command

    result = command.polish(run_folder, base=base, num_threads=threads, console=cli.progress(as_json=json))
    cli.emit(result, as_json=json, show=lambda: cli.show(f"adapter   {result['adapter']}"))
