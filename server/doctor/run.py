"""A run file, its base, and room for its checkpoints."""

from pathlib import Path
from typing import Final

from common.data import read
from common.data.rows import Columns
from common.doctor import checks
from common.doctor.doctor import Result, check, count, failed, ok, skipped
from common.errors import DataError, SilotuneError
from common.model import base as model
from common.model import loading, peft_kinds, size, store
from common.run import config
from common.run.config import RunConfig
from common.run.schema.model import AdapterConfig
from common.run.schema.tables import OutputConfig
from common.run.schema.training import DataConfig
from server.view import figures

_LESS: Final = "free space, name another disk in output.folder, or set output.keep_checkpoints"
RECORDS_BYTES: Final = 64 << 20  # events, records and the report


@check("run file", remedy="correct the file; docs/config.md lists its settings")
def file(path: Path) -> Result:
    """Check the run file."""
    run = config.load(path)
    federation = run.federation
    return ok(
        f"{path}: {run.name}, {count(federation.num_rounds, 'round')}, at least {count(federation.min_sites, 'site')}"
    )


@check("base model", remedy="fetch it: silotune-sim base NAME --store STORE, or give --base DIR")
def base(run: RunConfig, folder: Path | None) -> Result:
    """Hold the base's files against `model.sha256`, and tokenizer, positions and layers against the run."""
    where = folder or store.resolve(run.model.base)
    sha256 = model.check_hash(where, run.model.sha256)
    shape = size.read(where)
    for name in run.adapter.layers:
        if not shape.targets([name]):
            return failed(f"{where} has no layer {name}", "correct adapter.targets")
    share = loading.check(run, where)
    number = _num_values(run.adapter, where, num_core_heads=run.aggregation.num_core_heads)
    pinned = "as model.sha256 says" if run.model.sha256 else "model.sha256 is empty, so any base would do"
    stored = f"{run.model.quantization}, {figures.percent_of_base(share)} of its body" if share else "not quantised"
    return ok(f"{where}: {sha256[:12]}, {pinned}; {stored}; the adapter has {number:,} values")


def _num_values(adapter: AdapterConfig, base: Path, *, num_core_heads: int) -> int:
    """Values of the run's adapter on a base; of other kinds than LoRA peft counts them."""
    if adapter.kind == "lora":
        shape, rank = size.read(base), adapter.r
        in_cores = len(shape.targets(adapter.targets)) * rank * rank // num_core_heads if num_core_heads else 0
        return shape.num_adapter_parameters(adapter.targets, r=rank) + in_cores
    with model.quiet_peft():
        return peft_kinds.num_parameters(base, adapter)


@check("checkpoints", remedy=_LESS)
def checkpoints(
    output: OutputConfig, adapter: AdapterConfig, base: str, *, num_rounds: int, num_core_heads: int
) -> Result:
    """Check that all checkpoints of the run have room: one float32 adapter a round, and one more at the end.

    Args:
        base: Folder of the base, or its name in the store.
    """
    try:
        number = _num_values(adapter, store.resolve(base), num_core_heads=num_core_heads)
    except SilotuneError:
        return skipped("the base is not known, nor the adapter's size")
    kept = min(num_rounds, output.keep_checkpoints or num_rounds) + 1
    need = kept * number * size.FLOAT32_BYTES + RECORDS_BYTES
    what = f"{kept} adapters of {number:,} values"
    return checks.disk(Path(output.folder), need_bytes=need, what=what, remedy=_LESS)


@check("own held-out rows", remedy="correct the file that evaluation.server_data names")
def server_rows(path: str, data: DataConfig) -> Result:
    """Count the coordinator's own rows, without their text."""
    if not path:
        return skipped("evaluation.server_data is empty")
    if not Path(path).expanduser().exists():  # else it would be taken for the name of a data set
        raise DataError(f"{path}: no such file or folder; correct evaluation.server_data")
    columns = Columns(data.instruction_column, data.input_column, data.output_column, data.unit_column)
    return ok(count(len(read.read(path, columns=columns)), "row"))
