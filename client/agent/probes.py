"""A global adapter that no training gives but that would make an update speak of single rows.

Source: rank traps and zeroed factors as in Fowl et al. 2022, arXiv:2110.13057 (malicious parameters read updates).
"""

from typing import Final

import torch
from torch import Tensor

from common.adapter.adapter import Tensors
from common.errors import PolicyRefusedError

MIN_EIGENVALUE_SHARE: Final = 1e-10


def check(tensors: Tensors, *, max_tensor_norm: float) -> None:
    """Refuse an adapter with a huge tensor, or a down-projection whose rows are zero or depend on each other.

    Raises:
        PolicyRefusedError: Names the first tensor.
    """
    for name, tensor in tensors.items():
        if float(tensor.norm()) > max_tensor_norm:
            raise PolicyRefusedError(
                f"train.max_tensor_norm: tensor {name} of the adapter has a norm above {max_tensor_norm:g}",
                rule="train.max_tensor_norm",
            )
        if name.endswith((".lora_A.weight", ".lora_A")) and not _has_full_rank(tensor):
            raise PolicyRefusedError(
                f"train.adapter: rows of tensor {name} are zero or depend on each other", rule="train.adapter"
            )


def _has_full_rank(factor_ri: Tensor) -> bool:
    """Whether the rank is as large as the shape lets it be, by the Gram matrix of the rows scaled to length one."""
    rows_ri = factor_ri.to(torch.float64)
    norms_r1 = rows_ri.norm(dim=1, keepdim=True)
    if not bool((norms_r1 > 0).all()):
        return False
    unit_ri = rows_ri / norms_r1
    eigenvalues_r = torch.linalg.eigvalsh(unit_ri @ unit_ri.T)
    num_dependent = max(0, rows_ri.shape[0] - rows_ri.shape[1])
    return bool(eigenvalues_r[num_dependent] > MIN_EIGENVALUE_SHARE * eigenvalues_r[-1])
