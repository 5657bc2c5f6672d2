"""What the federation's signed roster says about this site and its operators; read anew whenever somebody asks."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.memory.history import RosterSeen
from client.policy.file import FederationRules
from common import storage
from common.errors import AuthError, ConfigError, PolicyRefusedError
from common.trust import governance, kit, roster
from common.trust.governance import Governance

RULE: Final = "roster"


@dataclass(frozen=True)
class Membership:
    """A roster that was believed.

    Attributes:
        operators: Public keys, hex, of those who may sign runs; none where the federation names no operator.
        site_keys: Public identity key of each, hex, by its name.
    """

    seen: RosterSeen
    operators: frozenset[str]
    num_sites: int
    site_keys: Mapping[str, str]


def check(folder: str, *, rules: FederationRules, seen: RosterSeen, site: str, identity_key: str) -> Membership | None:
    """Read the roster; believe it only if it is the newest that this site knows of and has this very site in it.

    Args:
        folder: Where `silotune-client install` left `federation.json` and `roster.json`; empty: the site reads none.
        seen: The roster that was accepted last, by the site's audit log.

    Returns:
        What it says; None where the site reads no roster and its policy asks for none.

    Raises:
        PolicyRefusedError: By rule `roster`: a file is missing or altered, too few signatures of the pinned governance,
            another federation or governance than before, an older roster or another one of the same epoch, or one
            without this site.
    """
    try:
        if not folder:
            if rules.roster_epoch_min:
                raise ConfigError("the policy asks for one; set agent.roster_folder in this site's own file")
            return None
        pinned, path = _pinned(Path(folder), rules=rules, seen=seen), Path(folder) / kit.ROSTER
        newest = roster.load(path, governance=pinned, epoch_min=max(1, seen.epoch))
        if newest.epoch < rules.roster_epoch_min:
            raise AuthError(
                f"{path} has epoch {newest.epoch}, the policy asks for {rules.roster_epoch_min}; fetch it anew"
            )
        if newest.epoch == seen.epoch and newest.sha256 != seen.sha256:
            raise AuthError(f"{path} differs from the roster of epoch {seen.epoch} seen before; tell the other sites")
        # A site that was revoked, or whose key was replaced, takes part in nothing.
        if newest.site(site).identity_key != identity_key:
            raise AuthError(
                f"epoch {newest.epoch} has another key for {site} than this site's own; ask the coordinator"
            )
        return Membership(
            RosterSeen(newest.epoch, newest.sha256, _sha256(pinned)),
            frozenset(peer.identity_key for peer in newest.operators),
            len(newest.sites),
            {peer.name: peer.identity_key for peer in newest.sites},
        )
    except (AuthError, ConfigError) as error:
        raise PolicyRefusedError(f"{RULE}: {error}", rule=RULE) from error


def take(folder: str, data: bytes, *, rules: FederationRules, seen: RosterSeen) -> None:
    """Put a roster that somebody brought into the site's folder, if the governance signed it and it is a newer one.

    Who brought it does not matter. Whether this site is still in it is for `check` to say: one that was revoked must
    not go on with the roster before.

    Raises:
        PolicyRefusedError: By rule `roster`: the site reads no roster, or as `check`; the roster in the folder stays.
        StorageError: It cannot be written; likewise.
    """
    try:
        if not folder:
            raise ConfigError("set agent.roster_folder in this site's own file, or start the link without --agent")
        if len(data) > governance.MAX_FILE_BYTES:
            raise AuthError(f"a roster of {len(data)} bytes came; the limit is {governance.MAX_FILE_BYTES}")
        pinned, path = _pinned(Path(folder), rules=rules, seen=seen), Path(folder) / kit.ROSTER
        here = roster.parse(governance.read(path), governance=pinned, epoch_min=1)
        newest = (here.epoch, here.sha256) if here.epoch > seen.epoch else (seen.epoch, seen.sha256)
        came = roster.parse(data, governance=pinned, epoch_min=newest[0])
        if came.epoch == newest[0] and came.sha256 != newest[1]:
            raise AuthError(f"it differs from the roster of epoch {came.epoch} seen before; tell the other sites")
    except (AuthError, ConfigError) as error:
        raise PolicyRefusedError(f"{RULE}: the roster that came is refused: {error}", rule=RULE) from error
    if came.sha256 != here.sha256:
        storage.write_atomic(path, data)


def _pinned(folder: Path, *, rules: FederationRules, seen: RosterSeen) -> Governance:
    """The governance that this site pinned; never another one than before."""
    pinned = governance.load(folder / kit.PINNED)
    if pinned.federation_id != rules.id or seen.governance_sha256 not in ("", _sha256(pinned)):
        raise AuthError(f"{folder / kit.PINNED} is of another federation or governance than this site is in; ask why")
    return pinned


def _sha256(pinned: Governance) -> str:
    return hashlib.sha256(pinned.to_bytes()).hexdigest()
