"""The canonical adapter: the one form that every reader of adapters takes for the same function.

alpha = r, so that the scale is exactly 1 for readers that ignore rsLoRA or patterns (llama.cpp's converter ignores
both, vLLM ignores patterns); one rank for all modules, from the list that vLLM takes; no DoRA, no trained bias, no
modules that are saved whole.

d and k: output and input width of a module, r: rank.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from peft import PeftConfig
from torch import Tensor
from torch.nn.functional import pad

from common import storage
from common.adapter import adapter, peft_config
from common.adapter.adapter import Tensors
from common.frame.records import TensorSpec
from common.run.schema.model import LoraAdapter
from server.aggregate import factored

RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's MaxLoRARanks without 1, which some releases refuse


def listed_rank(rank: int) -> int:
    """The next rank of the list; above 512 the rank itself, which peft and a merge still take and vLLM does not.

    Source: vllm/config/lora.py, `MaxLoRARanks` (0.14 and later).

    Example:
        >>> [listed_rank(rank) for rank in (1, 8, 9, 257, 512, 513)]
        [8, 8, 16, 320, 512, 513]
    """
    return next((listed for listed in RANKS if listed >= rank), rank)


def canonical(tensors: Tensors, settings: LoraAdapter) -> dict[str, Tensor]:
    """The same function with scale 1: a side adapter joined, the scale in B, zeros up to a listed rank.

    B A + U V = [B, U] [A; V], for both stand under the same scale.

    Args:
        tensors: Under the run's names, with or without a side adapter.

    Returns:
        `lora_A` and `lora_B` of every module, float32, all of one rank.

    Shape: A (r, k), B (d, r).
    """
    padded: dict[str, Tensor] = {}
    for module, (b_dr, a_rk) in factored.effective(tensors).items():
        missing = listed_rank(a_rk.shape[0]) - a_rk.shape[0]
        padded |= factored.named(module, pad(settings.scale * b_dr, (0, missing)), pad(a_rk, (0, 0, 0, missing)))
    return padded


def rank_of(tensors: Tensors) -> int:
    """The rank of a canonical adapter.

    Example:
        >>> rank_of({"q.lora_A.weight": torch.zeros(8, 3), "q.lora_B.weight": torch.zeros(5, 8)})
        8
    """
    return int(next(tensor for name, tensor in tensors.items() if name.endswith(factored.A_SUFFIX)).shape[0])


def specs(tensor_specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Names and shapes that the canonical form of a run's adapter has."""
    empty = {spec.name: torch.empty(spec.shape, device="meta") for spec in tensor_specs}
    return adapter.specs(canonical(empty, LoraAdapter()))


def save(folder: Path, tensors: Tensors, *, base: str, card: str, made: PeftConfig | None = None) -> None:
    """Write an adapter as a folder that plain peft loads.

    Args:
        tensors: What `canonical` gave, or another kind's under the names of peft's files.
        base: The base's name in the configuration; empty: none.
        made: Configuration of another kind; None: the canonical one.

    Raises:
        StorageError: Disk full or not writable.
    """
    storage.write_atomic(folder / "adapter_model.safetensors", encoded(tensors))
    modules = adapter.module_names(adapter.specs(tensors))
    peft_config.write(folder, made or peft_config.canonical(rank_of(tensors), modules, base=base or None))
    storage.write_atomic(folder / "README.md", card.encode())


def encoded(tensors: Tensors) -> bytes:
    """The bytes of a canonical adapter's file: the same for the same tensors."""
    return adapter.encode(tensors, dtype="float32")
