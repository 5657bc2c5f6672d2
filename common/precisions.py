"""The precision of the base at each site, where sites have different ones; both ends derive it from the run alone.

The adapter's shapes and its start are the same at every precision, so that nothing else depends on it. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.config_types import Contradiction, names_a_site_twice
from common.kinds import Quantization

if TYPE_CHECKING:
    from common.config import RunConfig
    from common.config_model import ModelConfig
    from common.manifest import RunManifest


def of_site(settings: ModelConfig, site: str) -> Quantization:
    """The quantisation of the base at a site.

    Args:
        settings: Section `[model]` of the run.
        site: Its name; one that `model.site_quantization` does not name has `model.quantization`.
    """
    return settings.quantization_of_sites.get(site, settings.quantization)


def at_site(settings: ModelConfig, site: str) -> ModelConfig:
    """Section `[model]` as one site loads it."""
    return at(settings, of_site(settings, site))


def at(settings: ModelConfig, quantization: Quantization) -> ModelConfig:
    """Section `[model]` with one precision for all."""
    return settings.model_copy(update={"quantization": quantization, "site_quantization": ""})


def used(settings: ModelConfig) -> list[Quantization]:
    """Every precision of a run, the run's own first.

    Example:
        >>> from common.config_model import ModelConfig
        >>> used(ModelConfig(base="b", quantization="nf4", site_quantization="south = none, west = int8"))
        ['nf4', 'none', 'int8']
    """
    return list(dict.fromkeys((settings.quantization, *settings.quantization_of_sites.values())))


def codes_at_site(run_manifest: RunManifest, site: str) -> str:
    """Hash of the 4-bit codes that a site must have; empty where its base has none."""
    return run_manifest.codes_sha256 if of_site(run_manifest.run.model, site) == "nf4" else ""


def contradictions() -> Iterator[Contradiction]:
    """Keys, whether a run asks for both, and the message, of sites with precisions of their own."""
    yield (
        ("model.site_quantization", "model.quantization"),
        _has_idle_names,
        "name each site once, and only those whose precision differs from model.quantization, which all others have",
    )


def _has_idle_names(run: RunConfig) -> bool:
    own = run.model.quantization_of_sites.values()
    return names_a_site_twice(run.model.site_quantization) or run.model.quantization in own
