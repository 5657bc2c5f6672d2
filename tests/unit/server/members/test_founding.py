import dataclasses
import json
import os
import ssl
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from common.errors import AuthError, ConfigError, StorageError
from common.trust import certs, governance, identity, roster
from server.members import ca, folder, founding, founding_config
from server.members import changes as admit
from server.members.ca import Span
from tests.samples.federations import NOW, TEXT, Federation, caller, day, listener, shake_hands, start


def newest(federation: Federation) -> roster.Roster:
    return roster.load(federation.folder / "roster.json", governance=federation.pinned, epoch_min=1)


def site_pair(federation: Federation, name: str) -> tuple:
    return federation.folder / "kits" / name / "site.pem", federation.keys(name) / "tls.key"


def fleet(federation: Federation, *, crl: bool = False) -> ssl.SSLContext:
    servers, issuers = federation.folder / "servers", federation.folder / "ca"
    revoked = issuers / "sites.crl" if crl else None
    return listener(servers / "gateway.pem", servers / "gateway.key", trusted=issuers / "sites.pem", crl=revoked)


def control(federation: Federation) -> ssl.SSLContext:
    servers, issuers = federation.folder / "servers", federation.folder / "ca"
    return listener(servers / "gateway.pem", servers / "gateway.key", trusted=issuers / "operators.pem")


def dial(federation: Federation, certificate, key) -> ssl.SSLContext:
    return caller(certificate, key, trusted=federation.folder / "ca" / "root.pem")


def operator_pair(federation: Federation) -> tuple:
    return federation.folder / "operators" / "operator.pem", federation.folder / "operators" / "operator.key"


def test_a_federation_starts_with_epoch_1_and_no_sites(founded):
    first = newest(founded)
    assert (first.epoch, first.sites, first.quorum, len(first.governance)) == (1, (), 2, 3)
    assert [peer.name for peer in first.servers] == ["gateway"]
    assert [peer.name for peer in first.operators] == ["operator", "night"]
    signing = [identity.load(founded.folder / "operators" / f"{peer.name}.signing.key") for peer in first.operators]
    assert [peer.identity_key for peer in first.operators] == [identity.public_hex(key) for key in signing]
    assert governance.load(founded.folder / "federation.json") == dataclasses.replace(
        founded.pinned, keys=tuple(sorted(founded.pinned.keys))
    )


def test_every_private_key_is_0600_in_folders_of_0700(founded):
    files = [path for path in founded.folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert len(files) == 1 + 3 + 3 + 2 + 2 * 2
    assert {path.stat().st_mode & 0o7777 for path in files} == {0o600}
    assert {path.parent.stat().st_mode & 0o7777 for path in files} == {0o700}
    assert {path.suffix for path in files} == {".key"}


def test_an_authority_is_never_overwritten(founded):
    before = (founded.folder / "federation.json").read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        founding.provision(founded.folder.parent / "federation.toml", folder=founded.folder, now=NOW)
    assert (founded.folder / "federation.json").read_bytes() == before
    empty = founded.folder.parent / "other"
    empty.mkdir()
    founding.provision(founded.folder.parent / "federation.toml", folder=empty, now=NOW)
    assert (empty / "federation.json").read_bytes() != before


def test_a_full_disk_leaves_no_half_made_authority(tmp_path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    (tmp_path / "federation.toml").write_text(TEXT)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(StorageError):
            founding.provision(tmp_path / "federation.toml", folder=tmp_path / "onco-eu", now=NOW)
    assert [path.name for path in tmp_path.iterdir()] == ["federation.toml"]
    founding.provision(tmp_path / "federation.toml", folder=tmp_path / "onco-eu", now=NOW)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ("[governance]\nnum_keys = 2\nquorum = 3", "nothing could ever be signed"),
        ("[validity]\ncertificate_days = 14", "overlap must be shorter"),
        ("[validity]\nroot_days = 30", "an issuer must not outlive the root"),
        ("[validity]\ncertificate_days = 4000", "must not outlive its issuer"),
        ("[governance]\nkeys = 3", "unknown setting"),
        ("[gateway]\nport = 1", "unknown setting"),
    ],
)
def test_a_federation_file_that_contradicts_itself_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        founding_config.parse(TEXT + changes, name="federation.toml")
    founding_config.parse(TEXT, name="federation.toml")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"onco-eu"', '"Onco EU"'),
        ('"localhost",', '"localhost", "localhost",'),
        ("localhost", "local..host"),
        ("localhost", "1.2.3.4.5"),
        ("127.0.0.1", "::zz"),
        ('"operator",', '"gateway",'),
        ('"operator",', '"night",'),
        ("version = 1", "version = true"),
    ],
)
def test_names_that_fit_no_certificate_are_refused(old, new):
    assert old in TEXT
    with pytest.raises(ConfigError):
        founding_config.parse(TEXT.replace(old, new), name="federation.toml")


def test_two_sites_join_and_are_known_by_their_own_keys(joined):
    found = newest(joined)
    assert (found.epoch, [site.name for site in found.sites]) == (3, ["alder", "birch"])
    for site in found.sites:
        keys = joined.keys(site.name)
        assert site.identity_key == identity.public_hex(identity.load(keys / "identity.key"))
        assert site.node_key == certs.public_pem(certs.load_key(keys / "node.key"))
        assert site.node_key == (joined.folder / "nodes" / f"{site.name}.pub").read_text()
        assert site.tls_fingerprint == certs.fingerprint(certs.load_key(keys / "tls.key").public_key())


@pytest.mark.parametrize("name", ["alder", "birch"])
def test_a_site_and_the_gateway_meet_over_tls_1_3(joined, name):
    version, shown, seen = shake_hands(fleet(joined, crl=True), dial(joined, *site_pair(joined, name)))
    assert version == "TLSv1.3"
    certificate = x509.load_der_x509_certificate(shown)
    entry = newest(joined).site_of_tls(certs.fingerprint(certificate.public_key()), now_s=0)
    assert entry.name == name
    gateway = certs.fingerprint(x509.load_der_x509_certificate(seen).public_key())
    assert gateway == newest(joined).servers[0].tls_fingerprint


def test_openssl_itself_verifies_the_chains(joined):
    issuers = joined.folder / "ca"
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", issuers / "root.pem"]
    for purpose, role, leaf in (
        ("sslclient", "sites", site_pair(joined, "alder")[0]),
        ("sslclient", "operators", operator_pair(joined)[0]),
        ("sslserver", "servers", joined.folder / "servers" / "gateway.pem"),
    ):
        command = [*verify, "-untrusted", issuers / f"{role}.pem", "-purpose", purpose, leaf]
        subprocess.run(command, check=True, capture_output=True)
        other = "sslserver" if purpose == "sslclient" else "sslclient"
        assert subprocess.run([*command[:-2], other, leaf], capture_output=True, check=False).returncode != 0


def test_roles_do_not_pass_for_each_other(joined):
    site, operator = dial(joined, *site_pair(joined, "alder")), dial(joined, *operator_pair(joined))
    for server, client in ((control(joined), site), (fleet(joined), operator)):
        with pytest.raises(ssl.SSLError):
            shake_hands(server, client)
    shake_hands(control(joined), operator)
    shake_hands(fleet(joined), site)


def test_a_site_cannot_play_the_gateway(joined):
    certificate, key = site_pair(joined, "birch")
    fake = listener(certificate, key, trusted=joined.folder / "ca" / "sites.pem")
    with pytest.raises(ssl.SSLError):
        shake_hands(fake, dial(joined, *site_pair(joined, "alder")))
    with pytest.raises(ssl.SSLError, match="Hostname mismatch"):
        shake_hands(fleet(joined), dial(joined, *site_pair(joined, "alder")), host="gateway.evil.example")
    shake_hands(fleet(joined), dial(joined, *site_pair(joined, "alder")), host="gateway.onco.example")


def test_an_issuer_cannot_vouch_beyond_its_role(joined, tmp_path):
    """Even with the stolen key of the sites' issuer nobody can be an operator or another federation's site."""
    key = certs.create_tls_key(tmp_path / "x" / "tls.key")
    issuer = folder.load(joined.folder).issuer("sites")
    ours = "alder.sites.onco-eu.silotune.internal"
    names = (ours, "operator.operators.onco-eu.silotune.internal", "alder.sites.onco-us.silotune.internal")
    for name in names:
        made = ca.issue(
            "alder",
            role="sites",
            federation_id="onco-eu",
            key=key.public_key(),
            issuer=issuer,
            span=Span.of_days(NOW, 9),
            names=[name],
        )
        (tmp_path / "x" / "tls.pem").write_bytes(made.public_bytes(Encoding.PEM))
        client = dial(joined, tmp_path / "x" / "tls.pem", tmp_path / "x" / "tls.key")
        if name == ours:
            shake_hands(fleet(joined), client)
            continue
        with pytest.raises(ssl.SSLError):
            shake_hands(fleet(joined), client)


def test_an_expired_certificate_is_refused(founded):
    words = founded.enroll("alder")
    founded.admit("alder", words, now=day(-91))
    with pytest.raises(ssl.SSLError):
        shake_hands(fleet(founded), dial(founded, *site_pair(founded, "alder")))
    founded.join("birch")
    shake_hands(fleet(founded), dial(founded, *site_pair(founded, "birch")))


def test_wrong_words_admit_nobody(founded):
    words = founded.enroll("alder")
    for wrong in (founded.enroll("birch"), words.replace(words[0], "x"), ""):
        with pytest.raises(AuthError, match="compare them again"):
            founded.admit("alder", wrong)
    assert newest(founded).epoch == 1
    assert not (founded.folder / "kits").exists()
    founded.admit("alder", words)


def test_a_request_altered_on_its_way_is_refused(founded):
    words, path = founded.enroll("alder"), founded.request("alder")
    sound = path.read_bytes()
    founded.enroll("other")
    other = json.loads(founded.request("other").read_bytes())
    for field in ("identity_key", "node_key", "csr", "name", "federation_id", "replaces"):
        changed = json.loads(sound)
        changed["statement"][field] = "ab" * 32 if field == "replaces" else other["statement"][field] + "x"
        if field in ("identity_key", "node_key", "csr"):
            changed["statement"][field] = other["statement"][field]
        path.write_bytes(governance.wire.canonical_json(changed))
        with pytest.raises(AuthError):
            founded.admit("alder", words)
    path.write_bytes(sound)
    founded.admit("alder", words)


@pytest.mark.parametrize("proof", ["identity_proof", "node_proof", "tls_proof"])
def test_each_key_must_prove_that_its_private_half_is_there(founded, proof):
    """With words that fit, as if the site's admin had read out what an attacker made."""
    words, path = founded.enroll("alder"), founded.request("alder")
    founded.enroll("other")
    sound = path.read_bytes()
    changed = json.loads(sound) | {proof: json.loads(founded.request("other").read_bytes())[proof]}
    path.write_bytes(governance.wire.canonical_json(changed))
    with pytest.raises(AuthError, match=r"signature of key .* is not valid"):
        founded.admit("alder", words)
    path.write_bytes(sound)
    founded.admit("alder", words)


def test_a_request_for_another_federation_is_refused(founded):
    from client.join import enroll

    statement = enroll.enroll(founded.keys("alder"), federation_id="onco-us", name="alder")
    with pytest.raises(AuthError, match="to join onco-us, not onco-eu"):
        founded.admit("alder", statement.words)


def test_a_quorum_of_governance_keys_is_needed(founded, tmp_path):
    words = founded.enroll("alder")
    stranger = tmp_path / "stranger.key"
    identity.create(stranger)
    one, two, _ = founded.members
    for files in ([one], [one, one], [one, stranger]):
        with pytest.raises(ConfigError, match="govern"):
            admit.admit(
                founded.folder, request_file=founded.request("alder"), words=words, governance_files=files, now=NOW
            )
    two.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {two}"):
        founded.admit("alder", words)
    assert newest(founded).epoch == 1
    two.chmod(0o600)
    assert founded.admit("alder", words).epoch == 2


def test_an_issuers_key_that_others_can_read_issues_nothing(founded):
    words, key = founded.enroll("alder"), founded.folder / "ca" / "sites.key"
    key.chmod(0o640)
    with pytest.raises(ConfigError, match=f"chmod 600 {key}"):
        founded.admit("alder", words)
    key.chmod(0o600)
    founded.admit("alder", words)


def test_a_site_is_admitted_once(founded):
    words = founded.enroll("alder")
    founded.admit("alder", words)
    with pytest.raises(ConfigError, match="in the roster already"):
        founded.admit("alder", words)


def test_a_forged_roster_in_the_folder_is_noticed(joined):
    path = joined.folder / "roster.json"
    forged = json.loads(path.read_bytes())
    forged["roster"]["sites"] = forged["roster"]["sites"][:1]
    path.write_bytes(governance.wire.canonical_json(forged))
    with pytest.raises(AuthError, match="0 valid signatures"):
        joined.join("cedar")


def test_a_revoked_site_is_gone_and_stays_gone(joined):
    entry = newest(joined).site("alder")
    shake_hands(fleet(joined, crl=True), dial(joined, *site_pair(joined, "alder")))
    change = joined.revoke("alder")
    assert (change.epoch, [site.name for site in newest(joined).sites]) == (4, ["birch"])
    assert entry.tls_fingerprint in (joined.folder / "revoked.txt").read_text()
    with pytest.raises(ssl.SSLError):
        shake_hands(fleet(joined, crl=True), dial(joined, *site_pair(joined, "alder")))
    shake_hands(fleet(joined, crl=True), dial(joined, *site_pair(joined, "birch")))
    with pytest.raises(AuthError, match="revoked"):
        joined.admit("alder", "words of no importance")
    with pytest.raises(AuthError, match="not in epoch 4"):
        joined.revoke("alder")


def test_a_site_that_lost_its_keys_comes_back_with_new_ones(joined):
    joined.revoke("alder")
    joined.sites = joined.sites / "again"
    assert joined.join("alder").epoch == 5
    shake_hands(fleet(joined, crl=True), dial(joined, *site_pair(joined, "alder")))


def test_own_certificates_are_issued_anew_for_the_same_keys(tmp_path):
    federation = start(tmp_path, now=day(-91))
    with pytest.raises(ssl.SSLError):
        shake_hands(control(federation), dial(federation, *operator_pair(federation)))
    before = newest(federation)
    assert list(founding.reissue(federation.folder, now=NOW)) == ["gateway", "superlink", "operator", "night"]
    assert newest(federation) == before
    _, shown, _ = shake_hands(control(federation), dial(federation, *operator_pair(federation)))
    found = certs.fingerprint(x509.load_der_x509_certificate(shown).public_key())
    assert found == before.operators[0].tls_fingerprint


def test_one_command_at_a_time_changes_a_federation(founded):
    words = founded.enroll("alder")
    with folder.locked(founded.folder), pytest.raises(ConfigError, match="another command"):
        founded.admit("alder", words)
    founded.admit("alder", words)
    with pytest.raises(ConfigError, match="silotune-server provision"):
        folder.load(founded.folder.parent)


def test_the_superlinks_certificate_is_for_loopback_alone(founded, tmp_path):
    """Who holds its key passes for no gateway, whatever else of the federation trusts the root."""
    root, servers = founded.folder / "ca" / "root.pem", founded.folder / "servers"
    plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    plain.verify_flags |= ssl.VERIFY_X509_STRICT
    plain.load_verify_locations(root)
    far = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    far.load_cert_chain(servers / "superlink.pem", servers / "superlink.key")
    assert shake_hands(far, plain, host="127.0.0.1")[0] == "TLSv1.3"
    for host in ("gateway.onco.example", "localhost"):
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            shake_hands(far, plain, host=host)
    far.load_cert_chain(servers / "gateway.pem", servers / "gateway.key")
    assert shake_hands(far, plain, host="gateway.onco.example")[0] == "TLSv1.3"  # control
    assert "superlink" not in [peer.name for peer in newest(founded).servers]
