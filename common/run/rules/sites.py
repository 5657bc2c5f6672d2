"""Contradictions of a run whose noise is for sites as a whole; `common.run.rules.rules` adds them to its table."""

import functools
from collections.abc import Iterator

from common import accounting
from common.run.rules import compatibility
from common.run.schema.tables import Contradiction, RunTables


def contradictions() -> Iterator[Contradiction]:
    """Keys, whether a run is in it, and the message; what `compatibility.SITE_LEVEL` refuses comes first."""
    for one in compatibility.SITE_LEVEL:
        if not one.is_allowed:
            yield (one.key, "privacy.mode"), functools.partial(_is_asked, one), f"not under this mode: {one.reason}"
    yield from _OTHERS


def _is_asked(one: compatibility.SiteLevel, config: RunTables) -> bool:
    return config.privacy.mode == "site" and one.is_asked(config)


def _has_large_delta(config: RunTables) -> bool:
    num_sites = config.federation.num_sites
    if config.privacy.mode != "site" or not num_sites:
        return False
    return config.privacy.dp_delta > accounting.largest_delta(num_sites)


_OTHERS: tuple[Contradiction, ...] = (
    (
        ("federation.num_sites", "privacy.mode"),
        lambda c: c.privacy.mode == "site" and not c.federation.num_sites,
        "the noised sum is divided by the expected number of sites, so state how many there are",
    ),
    (
        ("privacy.dp_delta", "federation.num_sites", "privacy.mode"),
        _has_large_delta,
        "for n sites, delta may be at most the smaller of 1e-5 and 1 / (n ln n); lower it",
    ),
    (
        ("privacy.sampling_prob", "privacy.noise_at", "privacy.mode"),
        lambda c: c.privacy.mode == "site" and c.privacy.noise_at == "sites" and c.privacy.sampling_prob < 1,
        "the coordinator knows who was drawn and adds noise, so that drawing saves nothing; set 1",
    ),
    (
        ("privacy.adaptive_clipping", "privacy.noise_at", "privacy.mode"),
        lambda c: c.privacy.mode == "site" and c.privacy.noise_at == "sites" and c.privacy.adaptive_clipping,
        "the coordinator sees noised updates only and cannot count their norms; keep the clip norm fixed",
    ),
)
