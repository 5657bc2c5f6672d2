"""How far each precision of a run is from the base's files: what sites of different precision train beside."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Final

import torch

from common.event_kinds import BaseNoise
from common.model import layerwise
from common.model.base import Engine
from common.model.layerwise import Layer
from common.run.schema import precisions
from common.run.schema.model import ModelConfig
from common.scores import PrecisionNoise

OTHERS: Final = "all others"


@dataclass(frozen=True)
class Noise:
    """Relative errors ||Q(W) - W|| / ||W|| in the Frobenius norm.

    Attributes:
        error: Over all layers that a quantiser touches.
        targets: Over the layers of one name, such as `q_proj`.
        modules: Of each layer.
    """

    error: float
    targets: dict[str, float]
    modules: dict[str, float]


def measure(engine: Engine, settings: ModelConfig) -> dict[str, Noise]:
    """The noise of every precision of a run, each in one pass over the base's files, one layer in memory at a time.

    What a layer computes with is held against the files' own values, so that rounding to the compute type counts too.

    Args:
        engine: Says where the files are, and on which device to quantise.
        settings: Section `[model]` of the run.

    Raises:
        ModelError: A file is missing or damaged.
    """
    return {
        name: noise_of(layerwise.layers(engine.folder, precisions.at(settings, name), engine.device))
        for name in precisions.used(settings)
    }


def noise_of(layers: Iterable[Layer]) -> Noise:
    """The noise of layers; 0 where a weight is zero and stays so."""
    squares = {layer.name: _squares(layer) for layer in layers}
    by_target: dict[str, list[tuple[float, float]]] = {}
    for name, pair in squares.items():
        by_target.setdefault(name.rpartition(".")[2], []).append(pair)
    return Noise(
        error=_relative(squares.values()),
        targets={name: _relative(pairs) for name, pairs in sorted(by_target.items())},
        modules={name: _relative([pair]) for name, pair in squares.items()},
    )


def as_event(settings: ModelConfig, noise: Mapping[str, Noise]) -> BaseNoise:
    """Each precision, its sites as far as the run names them, and its errors."""
    named = settings.site_quantization.items()
    sites = {name: sorted(site for site, own in named if own == name) or [OTHERS] for name in noise}
    return BaseNoise(
        precisions={name: PrecisionNoise(sites=sites[name], **asdict(found)) for name, found in noise.items()}
    )


def _squares(layer: Layer) -> tuple[float, float]:
    """Squared norms of a layer's error and of its weight."""
    weight_dk = layer.weight_dk.float()
    error_dk = layer.used_dk.float() - weight_dk
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64).item() for tensor in (error_dk, weight_dk)]
    return norms[0] ** 2, norms[1] ** 2


def _relative(pairs: Iterable[tuple[float, float]]) -> float:
    """One norm over the other, over layers together."""
    errors, weights = zip(*pairs, strict=True)
    return math.sqrt(math.fsum(errors) / math.fsum(weights)) if math.fsum(weights) else 0.0
