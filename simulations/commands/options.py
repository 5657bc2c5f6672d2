"""Options that several commands of `silotune-sim` take, and the run file with what they say."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import cli

if TYPE_CHECKING:
    from common.run.config import RunConfig

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


def load(run_file: Path, *, model: str, data: str, overrides: Mapping[str, str]) -> "RunConfig":
    """The run file with the command line's settings.

    Raises:
        ConfigError: It cannot be read, or says what does not go together.
    """
    from common.run import config

    return config.load(run_file, overrides=changes(model=model, data=data, overrides=overrides))


def changes(*, model: str, data: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """What the command line changes, in the run file's own words."""
    named = {"model.base": model, "data.source": data}
    return {**{key: json.dumps(value, ensure_ascii=False) for key, value in named.items() if value}, **overrides}


def checked(run_file: Path, model: str, data: str, set_: Sequence[str] | None) -> dict[str, str]:
    """`--set` as overrides; the run file is read with them here, so that a wrong one is refused before torch is loaded.

    Raises:
        ConfigError: As `load`.
    """
    overrides = cli.overrides(set_)
    load(run_file, model=model, data=data, overrides=overrides)
    return overrides
