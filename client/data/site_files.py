"""A site's rows and bases, as its own file names them. Loads no model library, so that rows are checked at once."""

from collections.abc import Sequence
from pathlib import Path

from common.data import read
from common.data.rows import Columns, Row
from common.errors import DataError
from common.model import store
from common.run import config
from common.run.schema.objective import ObjectiveName


def read_rows(node: config.NodeConfig, path: str, *, objective: ObjectiveName = "sft") -> Sequence[Row]:
    """One of the site's files, by its own column names; those of preferences have fixed names."""
    return read.read(path, columns=columns_of(node, objective=objective))


def columns_of(node: config.NodeConfig, *, objective: ObjectiveName) -> Columns:
    """Which columns of the site's rows hold what."""
    data = node.data
    return Columns(data.instruction_column, data.input_column, data.output_column, data.unit_column, objective)


def check_apart(train: Sequence[Row], held_out: Sequence[Row]) -> None:
    """A patient who is trained on says nothing about those who are not.

    Raises:
        DataError: A unit has rows on both sides.
    """
    shared = {row.unit for row in train} & {row.unit for row in held_out}
    if shared:
        one = next(row for row in train if row.unit in shared)
        other = next(row for row in held_out if row.unit == one.unit)
        raise DataError(
            f"{len(shared)} units have rows both in data.path and in data.held_out_path, one of them in {one.row_id} "
            f"and in {other.row_id}; "
            "move all rows of a unit to one side, or remove held_out_path to let the run split them"
        )


def base_folders(node: config.NodeConfig) -> list[Path]:
    """Where this site may have bases."""
    if node.model.base:
        return [Path(node.model.base)]
    folder = Path(node.model.store) if node.model.store else store.DEFAULT
    return sorted(path for path in folder.glob("*") if path.is_dir())
