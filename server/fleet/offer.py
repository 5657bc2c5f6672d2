"""The operator of a run: the signature under its manifest, and the audit log that the same key signs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import ConfigError
from common.run import manifest
from common.run.manifest import Offer, RunManifest
from common.trust import identity
from server.fleet import trail
from server.fleet.trail import Trail

DAY_S: Final = 86_400


@dataclass(frozen=True)
class Operator:
    """Who signs a run; nobody signs one without keeping a log of it.

    Attributes:
        make_offer: Signs a manifest.
        trail: The audit log, and the heads of the sites' logs.
    """

    make_offer: Callable[[RunManifest], Offer]
    trail: Trail


def operator(
    key_file: str, *, federation: str, days: float, audit_folder: str = "", roster_folder: str = ""
) -> Operator | None:
    """What signs a run's manifest and keeps its log.

    Args:
        key_file: The operator's private key; empty: the run is not signed, only sites without a policy take it, and no
            log is kept.
        federation: Id of the federation whose sites are asked.
        days: How long sites may open the run, from now.
        audit_folder: Of the log; empty: see `trail.folder_of`.
        roster_folder: Of the federation's signed roster; empty: sites are known by the keys that they tell first.

    Raises:
        ConfigError: The key or the roster cannot be used, there is a key and no federation, or a roster and no key.
        AuthError: The roster is not the federation's.
        AuditError: The log is not whole, or is another key's.
        StorageError: The log cannot be written.
    """
    if not key_file:
        if roster_folder:
            raise ConfigError("--roster is for a signed run, whose sites sign where their logs stand; give a key")
        return None
    if not federation:
        raise ConfigError("a signed run is for one federation; give its id with --federation")
    if not 0 < days * DAY_S <= manifest.MAX_OFFER_S:
        raise ConfigError(f"--offer-days {days:g}: must be above 0 and at most {manifest.MAX_OFFER_S // DAY_S}")
    key = identity.load(Path(key_file))
    not_after = int(time.time() + days * DAY_S)
    return Operator(
        lambda run_manifest: manifest.sign(run_manifest, key, federation=federation, not_after=not_after),
        trail.open_trail(
            Path(key_file), federation=federation, folder=_path(audit_folder), roster_folder=_path(roster_folder)
        ),
    )


def _path(text: str) -> Path | None:
    """A path that was given, or none."""
    return Path(text) if text else None
