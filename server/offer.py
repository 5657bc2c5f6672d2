"""The operator's signature under a run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from common import identity, manifest
from common.errors import ConfigError
from common.manifest import Offer, RunManifest

DAY_S: Final = 86_400


def maker(key_file: str, *, federation: str, days: float) -> Callable[[RunManifest], Offer] | None:
    """What signs a run's manifest.

    Args:
        key_file: The operator's private key; empty: the run is not signed, and only sites without a policy take it.
        federation: Id of the federation whose sites are asked.
        days: How long sites may open the run, from now.

    Raises:
        ConfigError: The key cannot be used, or there is one and no federation.
    """
    if not key_file:
        return None
    if not federation:
        raise ConfigError("a signed run is for one federation; give its id with --federation")
    key = identity.load(Path(key_file))
    not_after = int(time.time() + days * DAY_S)
    return lambda run_manifest: manifest.sign(run_manifest, key, federation=federation, not_after=not_after)
