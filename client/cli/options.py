"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

NodeFile = Annotated[Path, typer.Argument(help="This site's own file.", metavar="NODE.toml")]
