"""LoRA's layers with their arithmetic done in few passes: what a card spends beside the base's own products.

    y = x W^T + s (x A^T) B^T

peft writes W x, copies it, makes s B A x, and adds both: four passes over y, and two more over x where the adapter is
float32 and the base is not. Here A x goes into y by the product's own addition, and W is dequantised once a pass, as
bitsandbytes does. The masters A and B stay float32; their products are taken in the type of x, as under autocast.

n rows of x, k and d in- and outputs of the layer, r rank.
"""

from typing import Any, Final

import bitsandbytes.functional
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

NAME: Final = "default"  # of the adapter that is trained
MIN_ROWS: Final = 64  # below it 4-bit weights are better multiplied as they are, as in generation


class LoraProduct(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T and its gradients by x, A and B; W is frozen and kept as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a_rk: Tensor, b_dr: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """y and x A^T, in the type of x; see the module."""
        x_nk = x.reshape(-1, x.shape[-1])
        a_rk, b_dr = a_rk.to(x.dtype), b_dr.to(x.dtype)
        y_nd, down_nr = x_nk @ _whole(weight, x.dtype).T, x_nk @ a_rk.T
        y_nd.addmm_(down_nr, b_dr.T, alpha=scale)
        ctx.save_for_backward(x_nk, down_nr, a_rk, b_dr)
        ctx.weight, ctx.scale, ctx.shape = weight, scale, x.shape
        ctx.mark_non_differentiable(down_nr)
        return y_nd.view(*x.shape[:-1], len(b_dr)), down_nr

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By x in its type, by A and B in float32."""
        x_nk, down_nr, a_rk, b_dr = ctx.saved_tensors
        dy_nd = grads[0].reshape(-1, grads[0].shape[-1])
        d_down_nr = (dy_nd @ b_dr) * ctx.scale
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_nd @ _whole(ctx.weight, dy_nd.dtype)).addmm_(d_down_nr, a_rk).view(ctx.shape)
        da_rk = (d_down_nr.T @ x_nk).float() if ctx.needs_input_grad[2] else None
        db_dr = (dy_nd.T @ down_nr).float() * ctx.scale if ctx.needs_input_grad[3] else None
        return dx, None, da_rk, db_dr, None


def _whole(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's weight (d, k) in the type of its inputs."""
    state = getattr(weight, "quant_state", None)
    plain: Tensor = weight if state is None else bitsandbytes.functional.dequantize_4bit(weight.data, state)
    return plain.to(dtype)


def install(model: nn.Module) -> int:
    """Let LoRA's layers use `LoraProduct` wherever it computes what peft would; everywhere else they stay peft's.

    That is a frozen 4-bit or plain base, one plain adapter that is on, no dropout, nobody who changes what A and B do,
    and at least `MIN_ROWS` rows; each call looks anew. Hooks that only look at what A gives are called as by peft.

    Returns:
        The number of layers that can use it.
    """
    layers = [module for module in model.modules() if _can_use(module)]
    for layer in layers:
        if not isinstance(layer.forward, _Forward):
            layer.forward = _Forward(layer)
    return len(layers)


def _can_use(module: Any) -> bool:
    """Whether a layer's base is one that `LoraProduct` multiplies by, and its adapter is of plain LoRA."""
    if not isinstance(module, LoraLayer) or NAME not in getattr(module, "lora_A", {}) or NAME in module.lora_variant:
        return False
    base = module.get_base_layer()
    is_linear = type(base) is nn.Linear or (isinstance(base, Linear4bit) and hasattr(base.weight, "quant_state"))
    return bool(is_linear) and not base.weight.requires_grad and not module.lora_bias[NAME]


class _Forward:
    """A layer's forward, which is peft's where the short way would be another computation."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._of_peft = layer, layer.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._layer
        a, b, base = layer.lora_A[NAME], layer.lora_B[NAME], layer.get_base_layer()
        is_changed = any("forward" in vars(m) or m._forward_pre_hooks or m._backward_hooks for m in (a, b))
        is_plain = (
            list(layer.active_adapters) == [NAME]
            and not (args or kwargs or is_changed or b._forward_hooks or layer.disable_adapters or layer.merged)
            and NAME not in layer.lora_variant
            and (not layer.training or isinstance(layer.lora_dropout[NAME], nn.Identity))
        )
        if not is_plain or x.numel() < MIN_ROWS * x.shape[-1]:
            result: Tensor = self._of_peft(x, *args, **kwargs)
            return result
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor
        down_nr: Tensor
        y, down_nr = LoraProduct.apply(x, base.weight, a.weight, b.weight, layer.scaling[NAME])  # type: ignore[no-untyped-call]
        for watch in a._forward_hooks.values():
            watch(a, (x,), down_nr.view(*x.shape[:-1], len(a.weight)))
        return y if base.bias is None else y + base.bias.to(y.dtype)
