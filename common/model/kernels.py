"""What a model's layers use on a card in the place of torch's own chains of small operations.

LoRA's products come from `lora_layers`; RMSNorm, SwiGLU and rotary positions from Liger (extra `gpu`; Hsu et al. 2024,
arXiv:2410.10989), layer by layer, and each only where it was seen to give what the layer gives.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from common.model import lora_layers

CLOSE: Final = 2e-2  # of values around 1 in bfloat16, which has 8 bits: two roundings apart
PROBE_ROWS: Final = 16


def install(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """Let the layers of a model on a card use quicker kernels; elsewhere nothing is changed.

    Args:
        model: With its adapter.
        device: Where it is.

    Returns:
        What is used now: of `lora`, `rms_norm`, `swiglu` and `rope`.
    """
    if device.type != "cuda":
        return ()
    used = ["lora"] if lora_layers.install(model) else []
    if importlib.util.find_spec("liger_kernel") is None:
        return tuple(used)
    quicker = {"rms_norm": _norms(model), "swiglu": _gates(model), "rope": _rope(model)}
    return (*used, *(name for name, num_layers in quicker.items() if num_layers))


def _norms(model: nn.Module) -> int:
    """RMSNorm in one kernel; the number of layers that use it."""
    layers: list[Any] = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    return sum(_replaced(layer, partial(_norm, layer), width=layer.weight.shape[-1]) for layer in layers)


def _norm(layer: Any, x: Tensor) -> Tensor:
    """Not in place: the gradient that comes in may belong to a sum with other readers."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    epsilon = getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", 1e-6)
    normed: Tensor = LigerRMSNormFunction.apply(x, layer.weight, epsilon, 0.0, "llama", False)
    return normed


def _gates(model: nn.Module) -> int:
    """down(silu(gate(x)) * up(x)) with one kernel in the middle; the number of layers that use it."""
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    layers: list[Any] = [module for module in model.modules() if all(hasattr(module, name) for name in names)]
    return sum(_replaced(layer, partial(_gate, layer), width=layer.gate_proj.in_features) for layer in layers)


def _gate(layer: Any, x: Tensor) -> Tensor:
    """A layer's forward."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    down: Tensor = layer.down_proj(LigerSiLUMulFunction.apply(layer.gate_proj(x), layer.up_proj(x)))
    return down


def _replaced(layer: Any, quick: Callable[[Tensor], Tensor], *, width: int) -> bool:
    """Let a layer compute by the quick way if that gives the same on drawn inputs.

    A partial function of the layer, and no closure: a copy of the model then computes with its own layers.
    """
    weight = next(layer.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16  # of 4-bit codes
    drawn = torch.randn(PROBE_ROWS, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)[None]
    with torch.no_grad():
        expected, found = layer(drawn), quick(drawn)
    is_same = expected.shape == found.shape and expected.dtype == found.dtype
    is_same = is_same and bool((found - expected).float().norm() <= CLOSE * expected.float().norm())
    if is_same:
        layer.forward = quick
    return is_same


def _rope(model: nn.Module) -> int:
    """Rotary positions of queries and keys in one kernel; the number of modeling files that use it.

    It is a function of the file in which transformers keeps a model, so other models of the kind call it too: on
    another device they get what stood there before.
    """
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    files = {
        sys.modules[type(layer).__module__] for layer in model.modules() if type(layer).__name__.endswith("Attention")
    }
    found: list[Any] = [file for file in files if hasattr(file, "apply_rotary_pos_emb")]
    for file in found:
        if not hasattr(file.apply_rotary_pos_emb, "of_transformers"):
            file.apply_rotary_pos_emb = _Rope(file.apply_rotary_pos_emb, liger_rotary_pos_emb)
    return sum(file.apply_rotary_pos_emb.is_same for file in found)


class _Rope:
    """Rotary positions, by the quick way on a card if that was seen to give the same."""

    def __init__(self, of_transformers: Callable[..., Any], quick: Callable[..., Any]) -> None:
        self.of_transformers, self._quick = of_transformers, quick
        draws = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, heads, PROBE_ROWS, 64, generator=draws).cuda() for heads in (4, 2))
        angles = torch.rand(1, PROBE_ROWS, 32, generator=draws).cuda().repeat(1, 1, 2)
        pairs = zip(
            of_transformers(q, k, angles.cos(), angles.sin()), quick(q, k, angles.cos(), angles.sin()), strict=True
        )
        self.is_same = all(bool((a - b).norm() <= CLOSE * a.norm()) for a, b in pairs)

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As transformers calls it."""
        use = self._quick if self.is_same and q.is_cuda and not (args or kwargs) else self.of_transformers
        return use(q, k, cos, sin, *args, **kwargs)
