"""Hash of a base's 4-bit codes: the quantised weights that a run trains beside, the same on every machine.

The hash of the base's files does not say what a site computes with: that also depends on the type in which the weights
were read and on the quantiser. The packed codes do, and CPU and CUDA agree on them byte for byte. They do not agree on
the second level of double quantisation, nor on 8-bit codes, so that neither is hashed; see decision 15.
"""

import hashlib
from collections.abc import Iterable
from typing import Final

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from common.errors import CodesDifferError
from common.frame import wire
from common.run.catalogue.kinds import Quantization

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
    return digest((name, (layer.out_features, layer.in_features), layer.weight.data) for name, layer in layers)


def digest(layers: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """The same hash, of names, shapes and packed codes; the names must come in order. Empty where there are none."""
    hashed = hashlib.sha256()
    nothing = hashed.hexdigest()
    for name, shape, packed in layers:
        codes_n = packed.view(torch.uint8).flatten()
        head = {"name": name, "shape": list(shape), "num_bytes": codes_n.numel()}
        hashed.update(wire.canonical_json(head) + b"\n")
        for start in range(0, codes_n.numel(), CHUNK_BYTES):
            hashed.update(codes_n[start : start + CHUNK_BYTES].cpu().numpy().data)
    return "" if hashed.hexdigest() == nothing else hashed.hexdigest()


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weights are 4-bit or 8-bit codes."""
    return isinstance(module, (Linear4bit, Linear8bitLt))


def quantization_of(base: nn.Module) -> Quantization:
    """The precision that a base really has, by its layers; an adapter on it makes no difference."""
    kinds = {type(module) for module in base.modules() if is_quantised(module)}
    return "none" if not kinds else "nf4" if any(issubclass(kind, Linear4bit) for kind in kinds) else "int8"


def check_quantization(found: Quantization, expected: Quantization) -> None:
    """The base that was loaded here has the precision that the run's manifest gives this site.

    Raises:
        CodesDifferError: It has not.
    """
    if found != expected:
        raise CodesDifferError(
            f"the base was loaded with quantisation '{found}' here, and the run's manifest gives this site "
            f"'{expected}'; load it as model.site_quantization and model.quantization say"
        )


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
