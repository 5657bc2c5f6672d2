"""`silotune-server polish`."""

from pathlib import Path
from typing import Annotated

import typer

from common import cli

RunFolder = Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN_FOLDER")]


def polish(
    run_folder: RunFolder,
    stages: Annotated[
        Path | None, typer.Option(help="New stages after the end of the run, into RUN_FOLDER/later/NN.", metavar="FILE")
    ] = None,
    keep_stages: Annotated[
        int | None,
        typer.Option(min=0, help="Play them on so many of the run's own stages; default: those that it exports."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base; default: model.base, in the store.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: every core.")] = 0,
    json: cli.JsonOption = False,
) -> None:
    """Run the polish stages that a run has not finished, or new ones after its end.

    No site takes part, and a private run spends no further budget. New stages get a run folder of their own, with their
    outcome, evidence and report; what the run has made stays as it is.

    \b
    Examples:
      silotune-server polish runs/triage
      silotune-server polish runs/triage --stages more-dpo.toml
      silotune-server polish runs/triage --stages other-dpo.toml --keep-stages 1
    """
    from server.folder import run_files

    run_files.stored_manifest(run_folder)  # told before torch is loaded

    from server.run import polish as command

    console = cli.progress(as_json=json)
    result = command.polish(
        run_folder, base=base, num_threads=threads, console=console, stages_file=stages, num_kept=keep_stages
    )
    where = ("--to", f"{result['folder']}/export", *(("--base", base) if base else ()))
    lines = (f"adapter   {result['adapter']}", cli.next_step("silotune-server", "export", result["folder"], *where))
    cli.emit(result, as_json=json, show=lambda: cli.show(*lines))
