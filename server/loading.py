"""What a run takes from the coordinator's own machine: its base, with an adapter of the run's form, and rows."""

from pathlib import Path

from common import model
from common.config import RunConfig
from common.data import read
from common.model import Engine
from common.rows import Columns, Row


def engine_of(run: RunConfig, folder: Path, *, num_threads: int = 0) -> Engine:
    """Load a base with all that the run attaches to it: adapter, side adapter and cores.

    Args:
        run: The run file; its `[model]` says how the base is loaded.
        folder: The base's files.
        num_threads: CPU threads of torch; 0: all cores.

    Raises:
        ModelError: Files missing, hash differs, precision impossible here, targets match nothing.
    """
    return model.load(
        folder,
        model=run.model,
        adapter_settings=run.adapter,
        seed=run.seed,
        num_threads=num_threads,
        residual_rank=run.aggregation.residual_rank,
        num_heads=run.aggregation.num_core_heads,
    )


def rows_of(source: str, run: RunConfig) -> list[Row]:
    """Rows in the run's columns, each with the answer that is learnt.

    Raises:
        DataError: The file is missing or unusable.
    """
    data = run.data
    return read.read(source, columns=Columns(data.instruction_column, data.input_column, data.output_column))
