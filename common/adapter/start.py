"""The adapter that a run starts from, as far as it follows from the manifest alone.

Where a method asks for it, A has orthonormal rows and B orthonormal columns, the same bytes on every machine. A
library's QR differs in the last bits from processor to processor. Here every step is one that IEEE 754 rounds in one
way only (add, subtract, multiply, divide, square root, in a fixed order), on draws that are whole numbers.

r: rank, k: input width of a module; of a B its output width.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from common.adapter.adapter import Tensors
from common.errors import ModelError
from common.frame.records import TensorSpec
from common.run.catalogue.methods import FACTS
from common.run.manifest import RunManifest
from common.run.trainable import factor_of

_PASSES = 2  # the second removes what rounding left of the first (Giraud et al. 2005: twice is enough)


def fixed(run_manifest: RunManifest) -> Tensors:
    """The tensors that coordinator and sites each make themselves, and that no message carries.

    Raises:
        ModelError: A module is too narrow for the rank.
    """
    run = run_manifest.run
    which = FACTS[run.aggregation.method].fixed
    return factors(run_manifest.tensor_specs, seed=run.seed, which=which)


def initial(run_manifest: RunManifest, attached: Tensors) -> Tensors:
    """The global adapter before the first round: no change to the base, B or the core being zero.

    Args:
        attached: The adapter as peft attaches it, A from the run's seed.

    Raises:
        ModelError: A module is too narrow for the rank.
    """
    run = run_manifest.run
    facts = FACTS[run.aggregation.method]
    if not facts.has_orthonormal_start:
        return attached
    which = facts.fixed or "A"
    return {**attached, **factors(run_manifest.tensor_specs, seed=run.seed, which=which)}


def factors(tensor_specs: Sequence[TensorSpec], *, seed: int, which: str = "A") -> dict[str, Tensor]:
    """Every A of an adapter, every B, or both (`AB`); a function of names, shapes and the run's seed alone.

    Raises:
        ModelError: A module is narrower than the rank.

    Source: frozen A as in arXiv:2403.12313; orthonormal as in arXiv:2505.12805.
    """
    wanted = [spec for factor in which for spec in tensor_specs if factor_of(spec.name) == factor]
    return {spec.name: _factor(spec, seed=seed) for spec in wanted}


def _factor(spec: TensorSpec, *, seed: int) -> Tensor:
    """One A, or one B, whose columns are made as rows; from a stream of its own."""
    is_turned = factor_of(spec.name) == "B"
    rank, width = spec.shape[::-1] if is_turned else spec.shape
    if rank > width:
        raise ModelError(f"tensor {spec.name}: {rank} rows of {width} values cannot be orthonormal; lower adapter.r")
    digest = hashlib.sha256(f"{seed}\x1f{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    draws_rk = 2 * torch.rand(rank, width, dtype=torch.float64, generator=generator) - 1
    rows_rk = _orthonormal(draws_rk).to(torch.float32)
    return rows_rk.T.contiguous() if is_turned else rows_rk


def _orthonormal(draws_rk: Tensor) -> Tensor:
    """Gram-Schmidt, row by row."""
    rows_rk = draws_rk.clone()
    for index, row_k in enumerate(rows_rk):
        before = rows_rk[:index]
        for _ in range(_PASSES if index else 0):
            shares = _sum(before * row_k)
            row_k = row_k - _sum((shares[:, None] * before).T)
        rows_rk[index] = row_k / _sum(row_k * row_k).sqrt()
    return rows_rk


def _sum(values: Tensor) -> Tensor:
    """Sum over the last axis by halves; torch's own order depends on the processor."""
    while (size := values.shape[-1]) > 1:
        half = size // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        values = torch.cat([folded, values[..., 2 * half :]], dim=-1)
    return values[..., 0]
