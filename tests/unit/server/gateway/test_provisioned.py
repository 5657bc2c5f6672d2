"""The gateway and a site's tunnel with the certificates and files that provisioning makes."""

import ssl
import time

import pytest

from client.courier import tunnel as link
from common.trust import certs
from server.gateway import members, rules, tls
from server.gateway.refusals import Refused
from tests.samples.federations import Federation, shake_hands, start


@pytest.fixture(scope="module")
def joined(tmp_path_factory) -> Federation:
    federation = start(tmp_path_factory.mktemp("federation"))
    for name in ("alder", "birch"):
        federation.join(name)
    return federation


def door(federation: Federation, role: str, told: list[str]) -> ssl.SSLContext:
    servers = federation.folder / "servers"
    files = {"certificate_file": servers / "gateway.pem", "key_file": servers / "gateway.key"}
    return tls.server_context(**files, ca_file=federation.folder / "ca" / f"{role}.pem", on_failure=told.append)


def tunnel(federation: Federation, name: str) -> ssl.SSLContext:
    certificate, key = federation.folder / "kits" / name / "site.pem", federation.keys(name) / "tls.key"
    return link.outward_context(
        ca_file=federation.folder / "ca" / "root.pem", certificate_file=certificate, key_file=key
    )


def load(federation: Federation, folder) -> members.Members:
    return members.load(
        roster_file=federation.folder / "roster.json",
        governance_file=federation.folder / "federation.json",
        watermark=folder / "watermark.json",
        revoked_file=federation.folder / "revoked.txt",
        now_s=time.time(),
    )


def test_a_site_is_known_by_its_certificate_and_its_node_key(joined, tmp_path):
    told: list[str] = []
    version, shown, _ = shake_hands(door(joined, "sites", told), tunnel(joined, "alder"))
    peer, known = tls.peer_of(shown), load(joined, tmp_path)
    node = certs.load_key(joined.keys("alder") / "node.key")
    assert (version, peer.name, told) == ("TLSv1.3", "alder", [])
    assert known.site_of(peer.fingerprint) == members.Site(
        "alder", certs.fingerprint(node.public_key()), certs.public_pem(node).encode()
    )


def test_a_site_does_not_get_through_the_operators_door(joined):
    told: list[str] = []
    with pytest.raises(ssl.SSLError):
        shake_hands(door(joined, "operators", told), tunnel(joined, "alder"))
    assert told == ["CERTIFICATE_VERIFY_FAILED"]


def test_a_tunnel_speaks_to_its_own_gateway_only(joined, tmp_path):
    other = start(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(door(other, "sites", []), tunnel(joined, "alder"))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(door(joined, "sites", []), tunnel(joined, "alder"), host="elsewhere.example")


def test_the_two_issuers_are_apart(joined):
    issuers = joined.folder / "ca"
    tls.check_apart(issuers / "sites.pem", issuers / "operators.pem")


def test_a_revoked_site_is_refused(joined, tmp_path):
    federation = joined.copy(tmp_path / "copy")
    _, shown, _ = shake_hands(door(federation, "sites", []), tunnel(federation, "birch"))
    fingerprint = tls.peer_of(shown).fingerprint
    assert load(federation, tmp_path).site_of(fingerprint).name == "birch"
    federation.revoke("birch")
    with pytest.raises(Refused, match="revoked"):
        rules.check_site([], fingerprint, known=load(federation, tmp_path))
