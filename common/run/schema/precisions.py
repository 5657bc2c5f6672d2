"""The precision of the base at each site, where sites have different ones; both ends derive it from the run alone.

The adapter's shapes and its start are the same at every precision, so that nothing else depends on it. Loads no torch.
"""

from common.run.catalogue.kinds import Quantization
from common.run.schema.model import ModelConfig
from common.run.schema.section import FrozenDict


def of_site(settings: ModelConfig, site: str) -> Quantization:
    """The quantisation of the base at a site.

    Args:
        settings: Section `[model]` of the run.
        site: Its name; one that `model.site_quantization` does not name has `model.quantization`.
    """
    return settings.site_quantization.get(site, settings.quantization)


def at_site(settings: ModelConfig, site: str) -> ModelConfig:
    """Section `[model]` as one site loads it."""
    return at(settings, of_site(settings, site))


def at(settings: ModelConfig, quantization: Quantization) -> ModelConfig:
    """Section `[model]` with one precision for all."""
    return settings.model_copy(update={"quantization": quantization, "site_quantization": FrozenDict()})


def used(settings: ModelConfig) -> list[Quantization]:
    """Every precision of a run, the run's own first.

    Example:
        >>> used(ModelConfig(base="b", quantization="nf4", site_quantization={"south": "none", "west": "int8"}))
        ['nf4', 'none', 'int8']
    """
    return list(dict.fromkeys((settings.quantization, *settings.site_quantization.values())))
