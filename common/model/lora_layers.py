"""LoRA's layers with their arithmetic done in few passes: what a card spends beside the base's own products.

    y = x W^T + s (x A^T) B^T

peft writes W x, copies it, makes s B A x, and adds both: four passes over y, and two more over x where the adapter is
float32 and the base is not. Here A x goes into y by the product's own addition, and W is dequantised once a pass, as
bitsandbytes does. The masters A and B stay float32; their products are taken in the type of x, as under autocast.

n rows of x, k and d in- and outputs of the layer, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

NAME: Final = "default"  # of the adapter that is trained
MIN_ROWS: Final = 64  # below it 4-bit weights are better multiplied as they are, as in generation


@dataclass(frozen=True)
class Frozen:
    """A layer's weight as it is stored, and how to get it whole by one kernel.

    Attributes:
        stored: The weight, or its 4-bit codes.
        absmax: Of 4-bit codes the scale of each block, float32: scales that are quantised themselves are written out
            once, 0.4 bits a weight, as every pass would do it twice.
        state: bitsandbytes' description of the codes; None for a plain weight.
    """

    stored: Tensor
    absmax: Tensor | None = None
    state: Any = None

    @classmethod
    def of(cls, weight: Tensor) -> "Frozen":
        """Of a layer's weight."""
        state: Any = getattr(weight, "quant_state", None)
        if state is None:
            return cls(weight)
        absmax = state.absmax
        if state.nested:
            absmax = (functional.dequantize_blockwise(absmax, state.state2) + state.offset).float()
        return cls(weight.data, absmax, state)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight (d, k) in the type of a layer's inputs."""
        if self.state is None:
            return self.stored.to(dtype)
        state, codes = self.state, self.stored
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes, self.absmax, state.blocksize, state.quant_type, state.shape, state.dtype
        )
        return found if found.dtype == dtype else found.to(dtype)


class Factors(NamedTuple):
    """A and B in the type of a layer's inputs, and s B; as they were at some step."""

    a_rk: Tensor
    b_dr: Tensor
    scaled_b_dr: Tensor


class LoraProduct(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T and its gradients by x, A and B; W is frozen and kept as it is stored."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a_rk: Tensor, b_dr: Tensor, frozen: Frozen, factors: Factors, scale: float
    ) -> tuple[Tensor, Tensor]:
        """y and x A^T, in the type of x; see the module. A and B are the masters, `factors` what is computed with."""
        x_nk = x.reshape(-1, x.shape[-1])
        y_nd, down_nr = x_nk @ frozen.whole(x.dtype).T, x_nk @ factors.a_rk.T
        y_nd.addmm_(down_nr, factors.b_dr.T, alpha=scale)
        ctx.save_for_backward(x_nk, down_nr)
        ctx.frozen, ctx.factors, ctx.scale, ctx.shape = frozen, factors, scale, x.shape
        ctx.mark_non_differentiable(down_nr)
        return y_nd.view(*x.shape[:-1], len(b_dr)), down_nr

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By x in its type, by A and B in float32."""
        x_nk, down_nr = ctx.saved_tensors
        dy_nd = grads[0].reshape(-1, grads[0].shape[-1])
        d_down_nr = dy_nd @ ctx.factors.scaled_b_dr
        dx = None
        if ctx.needs_input_grad[0]:
            dx_nk = (dy_nd @ ctx.frozen.whole(dy_nd.dtype)).addmm_(d_down_nr, ctx.factors.a_rk)
            dx = dx_nk.view(ctx.shape)
        da_rk = _float32(d_down_nr.T, x_nk) if ctx.needs_input_grad[1] else None
        db_dr = _float32(dy_nd.T, down_nr).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        return dx, da_rk, db_dr, None, None, None


def _float32(left: Tensor, right: Tensor) -> Tensor:
    """A product in float32, which on a card is how it was added up."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def install(model: nn.Module) -> int:
    """Let LoRA's layers use `LoraProduct` wherever it computes what peft would; everywhere else they stay peft's.

    That is a frozen 4-bit or plain base, one plain adapter that is on, no dropout, nobody who changes what A and B do,
    and at least `MIN_ROWS` rows; each call looks anew. Hooks that only look at what A gives are called as by peft.

    Returns:
        The number of layers that can use it.
    """
    layers: list[Any] = [module for module in model.modules() if _can_use(module)]
    if layers and not any(isinstance(layer.forward, _Forward) for layer in layers):
        shared = _Shared(layers)
        for layer in layers:
            layer.forward = _Forward(layer, shared)
        causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        causal.base_model.register_forward_pre_hook(shared.begin)
        causal.base_model.register_forward_hook(shared.end, always_call=True)
    return len(layers)


class _Shared:
    """The factors of all layers, cast together when the first layer of a pass through the model asks for its own.

    A pass whose layers are all peft's, such as a token of generation, casts none.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers, self._is_open = layers, False
        self._cast: dict[torch.dtype, dict[int, Factors]] = {}

    def begin(self, *_: Any) -> None:
        """Before a pass."""
        self._is_open = True

    def end(self, *_: Any) -> None:
        """After it, whatever came of it."""
        self._is_open = False
        self._cast.clear()

    def of(self, layer: Any, dtype: torch.dtype) -> Factors:
        """A layer's factors as they are now; those of one that is called by itself, or anew, are cast alone."""
        if not self._is_open:
            return _cast([layer], dtype)[0]
        if dtype not in self._cast:
            self._cast[dtype] = dict(zip(map(id, self._layers), _cast(self._layers, dtype), strict=True))
        return self._cast[dtype][id(layer)]


def _can_use(module: Any) -> bool:
    """Whether a layer's base is one that `LoraProduct` multiplies by, and its adapter is of plain LoRA."""
    if not isinstance(module, LoraLayer) or NAME in module.lora_variant:
        return False
    if NAME not in module.lora_A or type(module.lora_A[NAME]) is not nn.Linear:  # AdaLoRA's are parameters
        return False
    base = module.get_base_layer()
    is_linear = type(base) is nn.Linear or (isinstance(base, Linear4bit) and hasattr(base.weight, "quant_state"))
    return bool(is_linear) and not base.weight.requires_grad and not module.lora_bias[NAME]


class _Forward:
    """A layer's forward, which is peft's where the short way would be another computation."""

    def __init__(self, layer: Any, shared: _Shared) -> None:
        self._layer, self._of_peft, self._shared = layer, layer.forward, shared
        self._frozen = Frozen.of(layer.get_base_layer().weight)

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
        scale, factors = layer.scaling[NAME], self._shared.of(layer, x.dtype)
        y: Tensor
        down_nr: Tensor
        y, down_nr = LoraProduct.apply(x, a.weight, b.weight, self._frozen, factors, scale)  # type: ignore[no-untyped-call]
        for watch in a._forward_hooks.values():
            watch(a, (x,), down_nr.view(*x.shape[:-1], len(a.weight)))
        return y if base.bias is None else y + base.bias.to(y.dtype)


@torch.no_grad()
def _cast(layers: Sequence[Any], dtype: torch.dtype) -> list[Factors]:
    """The factors of layers as they are now, all in a few kernels.

    Now, as nothing tells whether a master was written to: torch's fused AdamW on a card leaves its version as it was.
    """
    a = [layer.lora_A[NAME].weight.detach() for layer in layers]
    b = [layer.lora_B[NAME].weight.detach() for layer in layers]
    scaled_b = torch._foreach_mul(b, [layer.scaling[NAME] for layer in layers])
    masters = [*a, *b, *scaled_b]
    cast = [torch.empty_like(master, dtype=dtype) for master in masters]
    torch._foreach_copy_(cast, masters)
    count = len(layers)
    return [Factors(*three) for three in zip(cast[:count], cast[count : 2 * count], cast[2 * count :], strict=True)]
