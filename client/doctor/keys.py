"""Keys, certificate and roster of a site: that they are there, belong together and are good now."""

import datetime
from pathlib import Path
from typing import Final

from client.join import enroll, install
from common.doctor import checks
from common.doctor.doctor import Result, check, count, failed, ok, skipped
from common.errors import AuthError
from common.trust import certs, governance, identity, kit, roster

KEYS: Final = (enroll.IDENTITY_KEY, enroll.NODE_KEY, enroll.TLS_KEY)
_NO_FOLDER: Final = skipped("no folder of keys is known", "give --keys DIR, the folder that enroll made")
_RENEW: Final = "run: silotune-client renew KEYS, send renewal.json to the coordinator, install the kit that comes"


def key_files(folder: Path | None, *, identity_key: str) -> Result:
    """Hold the private keys against the rule of key files; a folder that `enroll` made must have all three."""
    paths = [Path(identity_key)] if identity_key else []
    if folder is not None:
        is_whole = (folder / enroll.REQUEST).exists()
        paths += [folder / name for name in KEYS if is_whole or (folder / name).exists()]
    return checks.key_files(paths)


@check("enrolment", remedy="restore the folder of keys from one backup, or enrol anew in a new folder")
def own_request(folder: Path | None) -> Result:
    """Hold the keys against the request that the coordinator admitted; the TLS key may have been renewed since."""
    if folder is None:
        return _NO_FOLDER
    if not (folder / enroll.REQUEST).exists():
        return _absent(folder, enroll.REQUEST)
    statement = enroll.own_statement(folder)
    if identity.public_hex(identity.load(folder / enroll.IDENTITY_KEY)) != statement.identity_key:
        return failed(f"{enroll.IDENTITY_KEY} is not the key that {enroll.REQUEST} asked with")
    if certs.public_pem(certs.load_key(folder / enroll.NODE_KEY)) != statement.node_key:
        return failed(f"{enroll.NODE_KEY} is not the key that {enroll.REQUEST} asked with")
    return ok(f"{statement.name} asked to join {statement.federation_id} with these keys")


@check("certificate", remedy="install the newest kit: silotune-client install KIT --keys KEYS")
def certificate(folder: Path | None, *, now: datetime.datetime) -> Result:
    """Check that the site's certificate is for its TLS key and leads to the root, and that both are good now."""
    if folder is None:
        return _NO_FOLDER
    for name in (kit.CERTIFICATE, kit.CA, enroll.TLS_KEY):
        if not (folder / name).exists():
            return _absent(folder, name)
    chain, root = (certs.parse_chain(governance.read(folder / name), name=name) for name in (kit.CERTIFICATE, kit.CA))
    certs.check_chain(chain, root[0], name=kit.CERTIFICATE, now=now)
    key = certs.load_key(folder / enroll.TLS_KEY).public_key()
    if certs.fingerprint(chain[0].public_key()) != certs.fingerprint(key):
        return failed(f"{kit.CERTIFICATE} is not for {enroll.TLS_KEY}")
    return ok(f"{chain[0].subject.rfc4514_string()}: for {enroll.TLS_KEY}, leads to {kit.CA}")


@check("certificate's end", remedy=_RENEW)
def certificate_end(folder: Path | None, *, now: datetime.datetime) -> Result:
    """Check how long the site's certificate is good."""
    path = folder / kit.CERTIFICATE if folder is not None else None
    if path is None or not path.exists():
        return skipped("there is no certificate to look at")
    chain = certs.parse_chain(governance.read(path), name=kit.CERTIFICATE)
    return checks.expiry({kit.CERTIFICATE: chain[0].not_valid_after_utc}, now=now, remedy=_RENEW)


@check("roster", remedy="take the newest roster: silotune-client roster ROSTER.json --keys KEYS")
def membership(folder: Path | None, *, name: str, now: datetime.datetime) -> Result:
    """Check that the pinned governance signed the roster, that it is no old one, and that it has this site's keys."""
    if folder is None:
        return _NO_FOLDER
    for file in (kit.PINNED, kit.ROSTER, install.WATERMARK):
        if not (folder / file).exists():
            return _absent(folder, file)
    pinned = governance.load(folder / kit.PINNED)
    epoch_min = roster.seen_epoch(folder / install.WATERMARK)
    newest = roster.load(folder / kit.ROSTER, governance=pinned, epoch_min=epoch_min)
    if all(site.name != name for site in newest.sites):
        return failed(
            f"{name} is not in epoch {newest.epoch} of {newest.federation_id}'s roster: revoked, or never admitted",
            "ask the coordinator; a revoked site enrols anew, in a new folder. If the name is wrong, correct site.name",
        )
    entry, others = newest.site(name), []
    path = folder / enroll.IDENTITY_KEY
    if path.exists() and identity.public_hex(identity.load(path)) != entry.identity_key:
        others.append(path.name)
    path = folder / enroll.NODE_KEY
    if path.exists() and certs.public_pem(certs.load_key(path)) != entry.node_key:
        others.append(path.name)
    path = folder / kit.CERTIFICATE
    if path.exists():
        fingerprint = certs.fingerprint(certs.parse_chain(governance.read(path), name=path.name)[0].public_key())
        try:  # a TLS key that is being replaced counts until its end
            is_own = newest.site_of_tls(fingerprint, now_s=now.timestamp()).name == name
        except AuthError:
            is_own = False
        others += [] if is_own else [path.name]
    if others:
        return failed(f"the roster has other keys of {name} than {', '.join(others)}", "install the newest kit")
    quorum = f"{pinned.quorum} of {len(pinned.keys)} governance keys must sign"
    sites = count(len(newest.sites), "site")
    return ok(f"{name} is in epoch {newest.epoch} of {newest.federation_id}, {sites}; {quorum}")


def _absent(folder: Path, name: str) -> Result:
    """A missing file: wrong in a folder that a kit was installed in, else only not examined."""
    is_installed = (folder / enroll.REQUEST).exists() and (folder / kit.PINNED).exists()
    if is_installed:
        return failed(f"{folder / name} is not there", "restore it from your backup, or install the newest kit")
    return skipped(f"{folder} has no {name}", "give --keys DIR, the folder that enroll made and a kit was installed in")
