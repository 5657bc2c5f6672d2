import base64
import dataclasses
import os
import shutil

import pytest
from cryptography.hazmat.primitives import serialization

from client.join import enroll, install
from common.errors import AuthError, ConfigError, StorageError
from common.trust import certs, governance, identity, kit, roster
from tests.samples.federations import NOW, caller, day, listener, seal, shake_hands, start


def test_keys_are_made_at_the_site_and_stay_there(tmp_path):
    statement = enroll.enroll(tmp_path / "keys", federation_id="onco-eu", name="alder")
    names = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "keys").iterdir()}
    assert names == {"identity.key": 0o600, "node.key": 0o600, "tls.key": 0o600, "request.json": 0o644}
    assert b"PRIVATE" not in (tmp_path / "keys" / "request.json").read_bytes()
    assert len(statement.words.split()) == 6
    assert enroll.own_statement(tmp_path / "keys") == statement


def test_the_node_key_is_one_that_a_supernode_reads(tmp_path):
    """As `flower-supernode` does it, and with what it sends to the SuperLink."""
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    statement = enroll.enroll(tmp_path / "keys", federation_id="onco-eu", name="alder")
    key = serialization.load_ssh_private_key((tmp_path / "keys" / "node.key").read_bytes(), None)
    header = base64.b64encode(public_key_to_bytes(key.public_key()))
    assert base64.b64decode(header) == statement.node_key.encode()


def test_enrolling_twice_overwrites_nothing(tmp_path):
    enroll.enroll(tmp_path / "keys", federation_id="onco-eu", name="alder")
    before = {path: path.read_bytes() for path in (tmp_path / "keys").iterdir()}
    with pytest.raises(ConfigError, match="never overwritten"):
        enroll.enroll(tmp_path / "keys", federation_id="onco-eu", name="birch")
    assert {path: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == before


@pytest.mark.parametrize("name", ["", "Alder", "-alder", "al/der", "../x", "a" * 64, "alder\n"])
def test_a_name_that_fits_no_certificate_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="--name: 1 to 63"):
        enroll.enroll(tmp_path / "keys", federation_id="onco-eu", name=name)
    assert not (tmp_path / "keys").exists()


def test_a_kit_is_installed_beside_the_keys(federation, offered):
    done = federation.install(offered, "alder")
    keys = federation.keys("alder")
    assert (done.name, done.epoch) == ("alder", 2)
    assert roster.seen_epoch(keys / "epoch.json") == 2
    assert governance.load(keys / "federation.json").words == federation.pinned.words
    assert {path.name for path in offered.iterdir()} - {path.name for path in keys.iterdir()} == {
        kit.SUMS,
        kit.SIGNATURES,
    }
    gateway = federation.folder / "servers"
    fleet = listener(gateway / "gateway.pem", gateway / "gateway.key", trusted=federation.folder / "ca" / "sites.pem")
    assert shake_hands(fleet, caller(keys / "site.pem", keys / "tls.key", trusted=keys / "ca.pem"))[0] == "TLSv1.3"


def test_installing_again_changes_nothing_and_keeps_the_sites_own_edits(federation, offered):
    federation.install(offered, "alder")
    policy = federation.keys("alder") / "policy.toml"
    policy.write_text("version = 1  # ours\n")
    before = {path: path.read_bytes() for path in federation.keys("alder").iterdir()}
    federation.install(offered, "alder", words="")
    assert {path: path.read_bytes() for path in federation.keys("alder").iterdir()} == before


@pytest.mark.parametrize("step", range(1, 14))
def test_an_interrupted_installation_can_be_run_again(federation, offered, monkeypatch, step):
    steps = iter(range(1, 99))
    replace = os.replace

    def interrupted(*given: object) -> None:
        if next(steps) == step:
            raise OSError(28, os.strerror(28))
        replace(*given)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        try:
            federation.install(offered, "alder")
        except StorageError:
            pass
        else:
            assert step > 11
    assert federation.install(offered, "alder").epoch == 2
    assert roster.seen_epoch(federation.keys("alder") / "epoch.json") == 2


def test_the_first_kit_needs_the_federations_words(federation, offered):
    with pytest.raises(ConfigError, match="six words"):
        federation.install(offered, "alder", words="")
    with pytest.raises(AuthError, match="compare them again"):
        federation.install(offered, "alder", words="lusab babad gutih tugad bisog mofip")
    assert not (federation.keys("alder") / "federation.json").exists()
    federation.install(offered, "alder")


def test_a_kit_of_an_impostors_federation_of_the_same_name_is_refused(federation, offered, tmp_path):
    impostor = start(tmp_path / "evil")
    impostor.sites = federation.sites
    statement = enroll.own_statement(federation.keys("alder"))
    forged = impostor.unpack(impostor.admit("alder", statement.words), tmp_path / "evil" / "kits")
    with pytest.raises(AuthError, match="compare them again"):
        federation.install(forged, "alder")
    federation.install(offered, "alder")
    with pytest.raises(AuthError, match="another federation or governance than this site pinned"):
        federation.install(forged, "alder", words=impostor.pinned.words)


@pytest.mark.parametrize("name", sorted({*kit.REQUIRED, "policy.toml", "compose.yaml", "silotune-agent.service"}))
def test_a_kit_with_one_altered_file_is_refused(federation, offered, name):
    path = offered / name
    sound = path.read_bytes()
    path.write_bytes(sound[:-2] + bytes([sound[-2] ^ 1]) + sound[-1:])
    with pytest.raises(AuthError):
        federation.install(offered, "alder")
    path.write_bytes(sound)
    federation.install(offered, "alder")


def test_sums_that_were_made_to_fit_are_refused(federation, offered):
    import hashlib

    sound = {name: (offered / name).read_bytes() for name in ("policy.toml", kit.SUMS)}
    (offered / "policy.toml").write_bytes(b"version = 1\n")
    old, new = (hashlib.sha256(data).hexdigest().encode() for data in (sound["policy.toml"], b"version = 1\n"))
    (offered / kit.SUMS).write_bytes(sound[kit.SUMS].replace(old, new))
    with pytest.raises(AuthError, match="startup kit of onco-eu has 0 valid signatures"):
        federation.install(offered, "alder")
    for name, data in sound.items():
        (offered / name).write_bytes(data)
    federation.install(offered, "alder")


def test_a_kit_with_more_or_fewer_files_is_refused(federation, offered):
    unit = offered / "silotune-agent.service"
    (offered / "extra.service").write_text("[Service]")
    with pytest.raises(AuthError, match=r"extra\.service was added"):
        federation.install(offered, "alder")
    (offered / "extra.service").unlink()
    unit.rename(offered.parent / "moved")
    with pytest.raises(AuthError, match=r"silotune-agent\.service was added, removed"):
        federation.install(offered, "alder")
    unit.symlink_to(offered.parent / "moved")
    with pytest.raises(AuthError, match="made a link"):
        federation.install(offered, "alder")
    unit.unlink()
    (offered.parent / "moved").rename(unit)
    federation.install(offered, "alder")


def test_a_signed_list_can_name_no_path(tmp_path):
    for line in ("../evil", "/etc/passwd", "..", "a\x1b"):
        with pytest.raises(AuthError, match="lists a name twice, a path"):
            kit._listed(f"{'ab' * 32}  {line}\n".encode())
    assert kit._listed(f"{'ab' * 32}  ca.pem\n".encode()) == {"ca.pem": "ab" * 32}


def test_another_sites_kit_is_refused(federation, offered, tmp_path):
    other = federation.unpack(federation.join("birch"), tmp_path / "kits")
    with pytest.raises(AuthError, match="for other keys"):
        federation.install(other, "alder")
    federation.install(offered, "alder")


@pytest.mark.parametrize("name", ["identity.key", "node.key", "tls.key"])
def test_a_key_file_that_others_can_read_stops_the_installation(federation, offered, name):
    path = federation.keys("alder") / name
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        federation.install(offered, "alder")
    path.chmod(0o600)
    federation.install(offered, "alder")


def test_a_kit_is_refused_when_the_clock_or_the_certificate_is_off(federation, offered):
    for when in (day(91), day(-1)):
        with pytest.raises(AuthError, match="check the clock"):
            federation.install(offered, "alder", now=when)
    federation.install(offered, "alder", now=day(89))


def test_an_older_kit_is_refused_after_a_newer_one(federation, offered, tmp_path):
    federation.install(offered, "alder")
    federation.join("birch")
    renewal = enroll.renew(federation.keys("alder"))
    newer = federation.unpack(federation.rotate(federation.keys("alder") / enroll.RENEWAL), tmp_path / "newer")
    assert renewal.replaces
    assert federation.install(newer, "alder").epoch == 4
    with pytest.raises(AuthError, match="is of epoch 2, 4 was seen before"):
        federation.install(offered, "alder")


def test_a_renewed_certificate_takes_over_and_the_old_one_ends_after_the_overlap(federation, offered, tmp_path):
    federation.install(offered, "alder")
    keys = federation.keys("alder")
    old = certs.fingerprint(certs.load_key(keys / "tls.key").public_key())
    enroll.renew(keys)
    change = federation.rotate(keys / enroll.RENEWAL, now=day(80))
    entry = roster.load(federation.folder / "roster.json", governance=federation.pinned, epoch_min=1).site("alder")
    assert entry.retiring_tls_fingerprint == old
    assert entry.retires_at == int(day(94).timestamp())
    done = federation.install(federation.unpack(change, tmp_path / "newer"), "alder", now=day(80))
    assert done.expires_at.date() == day(170).date()
    assert certs.fingerprint(certs.load_key(keys / "tls.key").public_key()) == entry.tls_fingerprint != old
    assert not (keys / "tls-next.key").exists()


def test_renewing_twice_before_the_kit_comes_asks_for_the_same_key(federation, offered):
    federation.install(offered, "alder")
    keys = federation.keys("alder")
    enroll.renew(keys)
    first = (keys / "tls-next.key").read_bytes()
    enroll.renew(keys)
    assert (keys / "tls-next.key").read_bytes() == first


def test_a_renewal_by_another_identity_key_is_refused(federation, offered, tmp_path):
    federation.install(offered, "alder")
    keys, thief = federation.keys("alder"), tmp_path / "thief"
    shutil.copytree(keys, thief)
    enroll.renew(keys)
    (thief / "identity.key").unlink()
    identity.create(thief / "identity.key")
    enroll.renew(thief)
    with pytest.raises(AuthError, match="another identity key than alder's"):
        federation.rotate(thief / enroll.RENEWAL)
    federation.rotate(keys / enroll.RENEWAL)


def test_an_old_renewal_cannot_bring_an_old_key_back(federation, offered, tmp_path):
    federation.install(offered, "alder")
    keys = federation.keys("alder")
    enroll.renew(keys)
    kept = tmp_path / "kept.json"
    shutil.copy(keys / enroll.RENEWAL, kept)
    federation.install(federation.unpack(federation.rotate(kept), tmp_path / "second"), "alder")
    with pytest.raises(AuthError, match="it is an old request"):
        federation.rotate(kept)
    enroll.renew(keys)
    federation.rotate(keys / enroll.RENEWAL)
    with pytest.raises(AuthError, match="it is an old request"):
        federation.rotate(kept)


def test_a_first_request_renews_nothing_and_a_renewal_admits_nobody(federation, offered):
    keys = federation.keys("alder")
    with pytest.raises(AuthError, match="old request"):
        federation.rotate(keys / enroll.REQUEST)
    statement = enroll.renew(keys)
    assert statement.replaces
    words = federation.enroll("birch")
    early = enroll.renew(federation.keys("birch"))
    first = federation.request("birch").read_bytes()
    shutil.copy(federation.keys("birch") / enroll.RENEWAL, federation.request("birch"))
    with pytest.raises(AuthError, match="use silotune-server rotate"):
        federation.admit("birch", early.words)
    federation.request("birch").write_bytes(first)
    federation.admit("birch", words)


def test_a_kit_with_another_root_is_refused_even_if_governance_signed_it(federation, offered, tmp_path):
    """Two members alone cannot make the site trust another certificate authority."""
    other = start(tmp_path / "other")
    keys = [identity.load(path) for path in federation.members[:2]]
    files = {path.name: path.read_bytes() for path in offered.iterdir() if path.name not in (kit.SUMS, kit.SIGNATURES)}
    root = (other.folder / "ca" / "root.pem").read_bytes()
    for changed, told in (({kit.CA: root}, "not the root"), ({kit.CERTIFICATE: root}, "does not lead to the root")):
        for name, data in seal({**files, **changed}, keys, pinned=federation.pinned).items():
            (offered / name).write_bytes(data)
        with pytest.raises(AuthError, match=told):
            federation.install(offered, "alder")
    for name, data in seal(files, keys, pinned=federation.pinned).items():
        (offered / name).write_bytes(data)
    federation.install(offered, "alder")


def test_the_pinned_words_cover_everything_that_is_pinned(federation):
    pinned = federation.pinned
    changes = [
        {"federation_id": "onco-us"},
        {"quorum": 1},
        {"keys": pinned.keys[:2]},
        {"root_sha256": "00" * 32},
    ]
    words = {dataclasses.replace(pinned, **change).words for change in changes}
    assert len(words) == 4
    assert pinned.words not in words


def test_a_site_takes_newer_rosters_only(federation, offered):
    federation.install(offered, "alder")
    keys, path = federation.keys("alder"), federation.folder / "roster.json"
    second = path.read_bytes()
    federation.join("birch")
    third = path.read_bytes()
    assert install.update_roster(path, keys=keys).epoch == roster.seen_epoch(keys / "epoch.json") == 3
    federation.revoke("birch")
    assert [site.name for site in install.update_roster(path, keys=keys).sites] == ["alder"]
    for old in (second, third):
        path.write_bytes(old)
        with pytest.raises(AuthError, match="4 was seen before"):
            install.update_roster(path, keys=keys)
    assert roster.load(keys / "roster.json", governance=federation.pinned, epoch_min=4).epoch == 4


def test_a_site_does_not_take_a_roster_without_itself(federation, offered):
    federation.install(offered, "alder")
    federation.revoke("alder")
    with pytest.raises(AuthError, match="alder is not in epoch 3"):
        install.update_roster(federation.folder / "roster.json", keys=federation.keys("alder"))
    assert roster.seen_epoch(federation.keys("alder") / "epoch.json") == 2


def test_a_site_tells_its_admin_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="silotune-client enroll first"):
        enroll.renew(tmp_path)
    enroll.enroll(tmp_path / "keys", federation_id="onco-eu", name="alder")
    with pytest.raises(ConfigError, match="cannot be read"):
        install.install(tmp_path, keys=tmp_path / "keys", words="", now=NOW)
