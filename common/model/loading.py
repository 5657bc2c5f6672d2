"""What a run takes from the machine that it runs on: its base, with an adapter of the run's form, and rows."""

from pathlib import Path

import torch

from common.data import read
from common.data.rows import Columns, Row
from common.model import base, base_files, probe, skeleton
from common.model.base import Engine
from common.run.config import ModelConfig, RunConfig
from common.run.schema import precisions
from common.run.schema.training import DataConfig
from common.text import prompts


def engine_of(
    run: RunConfig,
    folder: Path,
    *,
    own: ModelConfig | None = None,
    device_name: str = "auto",
    num_threads: int = 0,
    trains: bool = False,
    date: str = "",
) -> Engine:
    """Load a base with all that the run attaches to it: adapter, side adapter and cores.

    Args:
        own: How the base is loaded; None: as the run's `[model]` says.
        num_threads: CPU threads of torch; 0: all cores.
        trains: Whether rounds are trained on it, with gradient checkpointing if the run has that.
        date: Day of the run, YYYY-MM-DD, for a chat template that prints one; empty: the day on which it is rendered.

    Raises:
        ModelError: Files missing, hash differs, precision impossible here, targets match nothing, or the base is not
            fit for the run (`common.model.base_files`, `common.model.probe`).
    """
    _check_files(run, folder)
    return base.load(
        folder,
        model=own or run.model,
        adapter_settings=run.adapter,
        seed=run.seed,
        device_name=device_name,
        num_threads=num_threads,
        gradient_checkpointing=trains and run.training.gradient_checkpointing,
        residual_rank=run.aggregation.residual_rank,
        num_heads=run.aggregation.num_core_heads,
        date=date,
    )


def check(run: RunConfig, folder: Path, *, own: ModelConfig | None = None) -> float:
    """Find out without a weight whether a base is fit for a run: tokens, rows, precision and the adapter's layers.

    Args:
        own: How the base is loaded; None: as the run's `[model]` says.

    Returns:
        Part of the body's weights that would be quantised.

    Raises:
        ModelError: It is not fit.
    """
    settings = own or run.model
    prompts.use_template(base.load_tokenizer(folder), settings.chat_template)
    _check_files(run, folder)
    share = probe.planned_share(folder, base.quantization_config(settings, torch.float32))
    if run.adapter.kind == "lora":
        base.attach(skeleton.build(folder), run.adapter, seed=run.seed)
    return share


def _check_files(run: RunConfig, folder: Path) -> None:
    """What the base's files say against the run."""
    base_files.check_unquantised(folder)
    base_files.check_length(folder, run.data.max_length_tokens, num_prepended=run.adapter.num_prepended)
    for quantization in precisions.used(run.model)[1:]:  # of sites; the run's own is seen as it is loaded
        settings = precisions.at(run.model, quantization)
        probe.planned_share(folder, base.quantization_config(settings, torch.float32))
    for stage in run.polish:
        base_files.check_length(folder, stage.max_length_tokens, name=f"polish.max_length_tokens ({stage.name})")


def rows_of(source: str, data: DataConfig) -> list[Row]:
    """Rows in the run's columns, each with the answer that is learnt.

    Raises:
        DataError: The file is missing or unusable.
    """
    return read.read(source, columns=Columns(data.instruction_column, data.input_column, data.output_column))
