"""Hash of a base's 4-bit codes: the quantised weights that a run trains beside, the same on every machine.

The hash of the base's files does not say what a site computes with: that also depends on the type in which the weights
were read and on the quantiser. The packed codes do, and CPU and CUDA agree on them byte for byte. They do not agree on
the second level of double quantisation, nor on 8-bit codes, so that neither is hashed; see decision 15.
"""

import hashlib
from typing import Final

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from common import wire
from common.errors import CodesDifferError

CHUNK_BYTES: Final = 16 << 20


def sha256_of(base: nn.Module) -> str:
    """SHA-256 over name, shape and packed codes of every 4-bit layer, in the order of the names.

    The codes are read in place, in pieces: nothing is copied on the CPU, and 16 MiB at a time from elsewhere.

    Args:
        base: The base as it was loaded, before an adapter is attached.

    Returns:
        64 hexadecimal digits; empty for a base without 4-bit layers.
    """
    layers = sorted((name, module) for name, module in base.named_modules() if isinstance(module, Linear4bit))
    digest = hashlib.sha256()
    for name, layer in layers:
        codes_n = layer.weight.data.view(torch.uint8).flatten()
        shape = [layer.out_features, layer.in_features]
        digest.update(wire.canonical_json({"name": name, "shape": shape, "num_bytes": codes_n.numel()}) + b"\n")
        for start in range(0, codes_n.numel(), CHUNK_BYTES):
            digest.update(codes_n[start : start + CHUNK_BYTES].cpu().numpy().data)
    return digest.hexdigest() if layers else ""


def check(found: str, expected: str) -> None:
    """The codes of the base that was loaded here are those of the run's manifest.

    Raises:
        CodesDifferError: They are not.
    """
    if found != expected:
        raise CodesDifferError(
            f"the 4-bit codes of the base have hash {found or 'none'} here, and {expected or 'none'} in the run's "
            "manifest; set model.dtype in the run file, so that every machine quantises the same values, and use one "
            "release of bitsandbytes"
        )
