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
from server.view import by_precision

_LESS: Final = "free space, name another disk in output.folder, or set output.keep_checkpoints"
RECORDS_BYTES: Final = 64 << 20  # events, records and the report


@check("run file", remedy="correct the file; docs/config.md lists its settings")
def file(path: Path) -> Result:
    """Check the run file."""
    found = config.load(path)
    federation = found.federation
    return ok(
        f"{path}: {found.name}, {count(federation.num_rounds, 'round')}, at least {count(federation.min_sites, 'site')}"
    )


@check("base model", remedy="fetch it: silotune-sim base NAME --store STORE, or give --base DIR")
def base(found: RunConfig, folder: Path | None) -> Result:
    """Hold the base's files against `model.sha256`, and tokenizer, positions and layers against the run."""
    where = folder or store.resolve(found.model.base)
    sha256 = model.check_hash(where, found.model.sha256)
    shape = size.read(where)
    for name in found.adapter.targets:
        if not shape.targets([name]):
            return failed(f"{where} has no layer {name}", "correct adapter.targets")
    share = loading.check(found, where)
    number = _num_values(found, where, shape)
    pinned = "as model.sha256 says" if found.model.sha256 else "model.sha256 is empty, so any base would do"
    stored = f"{found.model.quantization}, {by_precision.percent(share)} of its body" if share else "not quantised"
    return ok(f"{where}: {sha256[:12]}, {pinned}; {stored}; the adapter has {number:,} values")


def _num_values(found: RunConfig, where: Path, shape: size.BaseShape) -> int:
    """Values of the run's adapter; of other kinds than LoRA peft counts them."""
    if found.adapter.kind == "lora":
        names, rank, num_heads = found.adapter.targets, found.adapter.r, found.aggregation.num_core_heads
        in_cores = len(shape.targets(names)) * rank * rank // num_heads if num_heads else 0
        return shape.num_adapter_parameters(names, r=rank) + in_cores
    with model.quiet_peft():
        return peft_kinds.num_parameters(where, found.adapter)


@check("checkpoints", remedy=_LESS)
def checkpoints(found: RunConfig, folder: Path | None) -> Result:
    """Tell whether all checkpoints of the run have room: one float32 adapter a round, and one more at the end."""
    try:
        where = folder or store.resolve(found.model.base)
        number = _num_values(found, where, size.read(where))
    except SilotuneError:
        return skipped("the base is not known, nor the adapter's size")
    rounds = found.federation.num_rounds
    kept = min(rounds, found.output.keep_checkpoints or rounds) + 1
    need = kept * number * size.FLOAT32_BYTES + RECORDS_BYTES
    what = f"{kept} adapters of {number:,} values"
    return checks.disk(Path(found.output.folder), need_bytes=need, what=what, remedy=_LESS)


@check("own held-out rows", remedy="correct the file that evaluation.server_data names")
def server_rows(found: RunConfig) -> Result:
    """Count the coordinator's own rows; text of a row is never told."""
    path = found.evaluation.server_data
    if not path:
        return skipped("evaluation.server_data is empty")
    if not Path(path).expanduser().exists():  # else it would be taken for the name of a data set
        raise DataError(f"{path}: no such file or folder; correct evaluation.server_data")
    data = found.data
    columns = Columns(data.instruction_column, data.input_column, data.output_column, data.unit_column)
    return ok(count(len(read.read(path, columns=columns)), "row"))
