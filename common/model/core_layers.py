"""Cores in a model: peft's LoRA layers, whatever base they stand on, with H between A and B as a variant of LoRA.

peft attaches A and B, quantised base or not, and calls a layer's variant for what it adds to the base's output. So
dropout, scale and types are those of LoRA, and gradient checkpointing sees nothing new.
"""

from typing import Any, Final, NoReturn

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from common.adapter import cores

_ADAPTER: Final = "default"


class Core(nn.Module):
    """H and s of one module: zero and one, see `common.adapter.cores`.

    Args:
        num_heads: m, which divides r.
    """

    def __init__(self, rank: int, num_heads: int, *, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rank, rank // num_heads, device=device))
        self.scale = nn.Parameter(torch.ones(num_heads, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Each head's part of A x through its own core.

        Shape: (..., r) to (..., r).
        """
        size = self.weight.shape[1]
        heads_mnn = cores.scaled(self.weight, self.scale).view(-1, size, size)
        return torch.einsum("...mi,moi->...mo", x.view(*x.shape[:-1], -1, size), heads_mnn).flatten(-2)


class Cored(LoraVariant):
    """What a LoRA layer with a core adds: c B blockdiag(s_h H_h) A x."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The base's output and the adapter's."""
        down = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        up: Tensor = module.lora_B[active_adapter](module.lora_H(down)) * module.scaling[active_adapter]
        return result + up.to(result.dtype)

    @staticmethod
    def _refuse(*given: Any, **named: Any) -> NoReturn:
        raise NotImplementedError("a core is not merged in place; `server.export.canonical` makes a plain pair of it")

    merge_safe = merge_unsafe = unmerge = _refuse


def attach(model: nn.Module, *, num_heads: int) -> None:
    """Put a core between A and B of every LoRA layer, float32; the model then changes nothing whatever A and B are.

    It stands outside peft's dictionaries of adapters: another one beside, such as a reference, is a plain pair.

    Args:
        model: With LoRA's layers, of a rank that `num_heads` divides.
    """
    for module in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        a_rk: Any = module.lora_A[_ADAPTER].weight
        module.lora_H = Core(len(a_rk), num_heads, device=a_rk.device)
        module.lora_variant[_ADAPTER] = Cored()
