"""Which layers to train, by the signal in their weights: Spectrum (arXiv:2406.06623), on a base's files, one at a time.

d outputs, k inputs of a layer, s singular values.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import ModelError
from common.model import size

NORMAL_IQR: Final = 1.349  # interquartile range of a normal distribution, in standard deviations


def measure(folder: Path) -> dict[str, float]:
    """Signal-to-noise ratio of every linear layer of a base but the output head, by its full name.

    Raises:
        ModelError: A file is missing or damaged.
    """
    linears = size.read(folder).linears
    found: dict[str, float] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if (module := name.removesuffix(".weight")) in linears:
                    found[module] = snr(tensors.get_tensor(name).to(torch.float32))
    if not found:
        raise ModelError(f"{folder}: has no linear layer whose weights could be measured")
    return found


def snr(weight_dk: Tensor) -> float:
    """Sum of the singular values above the noise over that of the others, over the largest one.

    The noise ends at sigma (1 + sqrt(beta)), beta the ratio of the sides, and sigma is read off the interquartile range
    of the singular values themselves. The ratio is not free of scale: of a layer twice as large it is half, as in the
    source, which compares layers of one type.

    Returns:
        Infinity where nothing is below, 0 where nothing is above.

    Source: Hartford et al. 2024, arXiv:2406.06623, section 3; the edge is Marchenko and Pastur's.

    Example:
        >>> round(snr(torch.diag(torch.tensor([9.0, 3.0, 2.9, 2.8, 0.1]))), 3)
        19.667
    """
    values_s = torch.linalg.svdvals(weight_dk)
    low, high = torch.quantile(values_s, torch.tensor([0.25, 0.75])).tolist()
    sides = sorted(weight_dk.shape)
    edge = (high - low) / NORMAL_IQR * (1 + math.sqrt(sides[0] / sides[1]))
    signal, noise = float(values_s[values_s > edge].sum()), float(values_s[values_s <= edge].sum())
    return signal / noise / float(values_s[0]) if noise else math.inf


def choose(found: Mapping[str, float], *, share: float) -> list[str]:
    """The best layers of each type, which is the last part of a name: a share of them, rounded up.

    Args:
        found: Of `measure`.
        share: Over 0, at most 1.

    Example:
        >>> choose({"0.q": 0.1, "1.q": 0.3, "0.v": 0.9, "1.v": 0.2}, share=0.5)
        ['0.v', '1.q']
    """
    types: dict[str, list[str]] = {}
    for name in sorted(found, key=lambda name: (-found[name], name)):
        types.setdefault(name.rpartition(".")[2], []).append(name)
    return sorted(name for names in types.values() for name in names[: math.ceil(share * len(names))])
