"""Cores between two frozen factors, which are what `ravan` trains: as tensors, without a model.

    dW = c sum_h s_h B_h H_h A_h = c B blockdiag(s_1 H_1, ..., s_m H_m) A

m heads of n directions each, r = m n, c the adapter's scale. B_h are n columns of B and A_h n rows of A, all of them
orthonormal, so that no head can do what another does. A core is kept as one tensor (r, n), its heads below each other.

A run begins with H = 0, so that dW = 0, and each round of a site with s = 1. The first gradient of H is then B^T G A^T,
while that of s is zero. The other way round, s = 0 and H drawn, the first gradient of H would be zero, and a head could
only be made longer in a direction that was drawn; with both at zero nothing would ever move. s is trained at the site
and never leaves it: what is sent is the product s_h H_h, whose mean is exact, and s begins at 1 again.

Source: RAVAN, arXiv:2506.05568. That its runs begin so is our choice, for the reasons above.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

WEIGHT: Final = ".lora_H.weight"
SCALE: Final = ".lora_H.scale"  # (m,); of a model's parameters only, in no adapter that is stored or sent
_A: Final = ".lora_A.weight"


def is_scale(name: str) -> bool:
    """Whether a parameter is the scales of a core's heads."""
    return name.endswith(SCALE)


def scale_beside(name: str) -> str:
    """The name of the scales that belong to a core; of any other tensor its own.

    Example:
        >>> scale_beside("q_proj.lora_H.weight"), scale_beside("q_proj.lora_A.weight")
        ('q_proj.lora_H.scale', 'q_proj.lora_A.weight')
    """
    return name.removesuffix(WEIGHT) + SCALE if name.endswith(WEIGHT) else name


def folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's parameters as an adapter: every core times its scales, and no scales."""
    found = {name: tensor for name, tensor in tensors.items() if not is_scale(name)}
    for name, tensor in found.items():
        if name.endswith(WEIGHT) and scale_beside(name) in tensors:
            found[name] = scaled(tensor, tensors[scale_beside(name)])
    return found


def scaled(core_rn: Tensor, scale_m: Tensor) -> Tensor:
    """Each head of a core times its scale.

    Shape: (r, n) and (m,) to (r, n).
    """
    return core_rn * scale_m.repeat_interleave(core_rn.shape[1])[:, None]


def down(core_rn: Tensor, a_rk: Tensor) -> Tensor:
    """blockdiag(H_1, ..., H_m) A: with B the plain pair that is the same function.

    Worked out in float64 and rounded once to A's type, so that every processor makes the same of it.

    Shape: (r, n) and (r, k) to (r, k).
    """
    heads = a_rk.shape[0] // core_rn.shape[1]
    heads_mnn = core_rn.double().view(heads, -1, core_rn.shape[1])
    rows_mnk = a_rk.double().view(heads, -1, a_rk.shape[1])
    return torch.bmm(heads_mnn, rows_mnk).flatten(0, 1).to(a_rk.dtype)


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function as a plain pair A and B of the same rank; an adapter without cores as it is."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(WEIGHT)}
    for name in [name for name in tensors if name.endswith(WEIGHT)]:
        a_name = name.removesuffix(WEIGHT) + _A
        found[a_name] = down(tensors[name], tensors[a_name])
    return found
