"""Options that several commands of `silotune-sim` take."""

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(help="The run file.", metavar="RUN.toml")]
OutputOption = Annotated[Path | None, typer.Option(help="The run's folder; default: a new one under output.folder.")]
ModelOption = Annotated[str, typer.Option("--model", help="Another base: a folder or a name in the store.")]
DataOption = Annotated[
    str, typer.Option("--data", help="Other rows: JSONL, JSON, CSV, TSV, Parquet, a folder, or a datasets id.")
]
ThreadsOption = Annotated[
    int, typer.Option(min=0, help="CPU threads; 0: all cores, or one in each process of the other engines.")
]
StoreOption = Annotated[Path | None, typer.Option(help="Folder with base models.")]
