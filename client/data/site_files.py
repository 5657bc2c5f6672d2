"""A site's rows and bases, as its own file names them. Loads no model library, so that rows are checked at once."""

from collections.abc import Sequence
from pathlib import Path

from common.data import read
from common.data.rows import Columns, Row
from common.errors import DataError
from common.model import store
from common.run import config
from common.run.schema.training import ObjectiveName


def read_rows(data: config.NodeDataConfig, path: str, *, objective: ObjectiveName = "sft") -> Sequence[Row]:
    """One of the site's files, by its own column names; those of preferences have fixed names."""
    return read.read(path, columns=columns_of(data, objective=objective))


def columns_of(data: config.NodeDataConfig, *, objective: ObjectiveName) -> Columns:
    """Which columns of the site's rows hold what."""
    return Columns(data.instruction_column, data.input_column, data.output_column, data.unit_column, objective)


def check_apart(train: Sequence[Row], held_out: Sequence[Row]) -> None:
    """A patient who is trained on says nothing about those who are not.

    Raises:
        DataError: A unit has rows on both sides.
    """
    shared = {row.unit for row in train} & {row.unit for row in held_out}
    if shared:
        first = next(row for row in train if row.unit in shared)
        other = next(row for row in held_out if row.unit == first.unit)
        raise DataError(
            f"{len(shared)} units have rows both in data.path and in data.held_out_path, one of them in {first.row_id} "
            f"and in {other.row_id}; "
            "move all rows of a unit to one side, or remove held_out_path to let the run split them"
        )


def base_folders(model: config.NodeModelConfig) -> list[Path]:
    """Folders in which this site may have bases."""
    if model.base:
        return [Path(model.base)]
    folder = Path(model.store) if model.store else store.DEFAULT
    return sorted(path for path in folder.glob("*") if path.is_dir())
