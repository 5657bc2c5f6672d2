import dataclasses
import os
import time

import pytest

from common.errors import AuthError, ConfigError
from server.gateway import members
from server.gateway.members import Members, Watched
from tests.attacks.pki import Pki, fingerprint


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Pki:
    made = Pki(tmp_path_factory.mktemp("pki"))
    made.issue("alder", made.sites)
    made.issue("olga", made.operators)
    made.write_roster(sites=("alder",), operators=("olga",))
    return made


def load(pki: Pki, folder, *, now_s: float = 0.0) -> Members:
    files = {name: pki.folder / f"{name.removesuffix('_file')}.json" for name in ("roster_file", "governance_file")}
    revoked = folder / "revoked.txt"
    revoked.touch()
    return members.load(**files, watermark=folder / "watermark.json", revoked_file=revoked, now_s=now_s)


def test_members_come_from_the_signed_roster(pki, tmp_path):
    known = load(pki, tmp_path)
    site = known.site_of(fingerprint(pki.tls["alder"]))
    assert (site.name, site.node_key) == ("alder", fingerprint(pki.nodes["alder"]))
    assert known.is_operator(fingerprint(pki.tls["olga"]))
    assert not known.is_operator(fingerprint(pki.tls["alder"]))
    assert known.site_of(fingerprint(pki.tls["olga"])) is None


def test_an_altered_roster_and_an_older_one_are_refused(pki, tmp_path, monkeypatch):
    load(pki, tmp_path)
    (tmp_path / "watermark.json").write_bytes(
        (tmp_path / "watermark.json").read_bytes().replace(b'"epoch":1', b'"epoch":2')
    )
    with pytest.raises(AuthError, match="epoch 1, 2 was seen before"):
        load(pki, tmp_path)
    whole = (pki.folder / "roster.json").read_bytes()
    (pki.folder / "roster.json").write_bytes(whole.replace(b"alder", b"aldee"))
    try:
        with pytest.raises(AuthError, match="signatures"):
            load(pki, tmp_path)
    finally:
        (pki.folder / "roster.json").write_bytes(whole)


def test_a_retiring_key_counts_until_its_end(pki, tmp_path, monkeypatch):
    old, accept = "f" * 64, members.roster.accept

    def with_retiring(*given, **named):
        found = accept(*given, **named)
        entry = dataclasses.replace(found.sites[0], retiring_tls_fingerprint=old, retires_at=1000)
        return dataclasses.replace(found, sites=(entry,))

    monkeypatch.setattr(members.roster, "accept", with_retiring)
    assert load(pki, tmp_path, now_s=999.0).site_of(old).name == "alder"
    assert load(pki, tmp_path, now_s=1000.0).site_of(old) is None


def test_revoked_keys_are_listed_one_a_line(tmp_path):
    path = tmp_path / "revoked.txt"
    path.write_text(f"# since May\n\n{'a' * 64}  # stolen\n{'b' * 64}\n")
    assert members.read_revoked(path) == {"a" * 64, "b" * 64}
    path.write_text(f"{'a' * 64}\n{'A' * 64}\n")
    with pytest.raises(ConfigError, match=r"revoked\.txt:2: not 64 digits"):
        members.read_revoked(path)
    with pytest.raises(ConfigError, match="cannot read this list"):
        members.read_revoked(tmp_path / "absent")


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path):
    file, clock, loaded = tmp_path / "a", [0.0], []
    file.write_text("1")

    def load() -> Members:
        loaded.append(file.read_text())
        return Members({}, frozenset({loaded[-1]}))

    watched = Watched([file], load=load, clock=lambda: clock[0], every_s=2.0)
    assert watched.now().is_operator("1")
    file.write_text("2")
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 1))
    assert watched.now().is_operator("1")  # not yet looked again
    clock[0] = 2.0
    assert watched.now().is_operator("2")
    clock[0] = 4.0
    watched.now()
    assert loaded == ["1", "2"]
    clock[0] = 31.0
    watched.now()
    assert loaded == ["1", "2", "2"]


def test_nobody_is_let_in_while_a_file_is_not_valid_and_it_is_not_read_for_each_request(tmp_path):
    file, clock, tries = tmp_path / "a", [0.0], []
    file.write_text("good")

    def load() -> Members:
        tries.append(1)
        if file.read_text() != "good":
            raise ConfigError("bad")
        return Members({}, frozenset({"x"}))

    watched = Watched([file], load=load, clock=lambda: clock[0], every_s=2.0)
    assert watched.now().is_operator("x")
    file.write_text("broken")
    clock[0] = 2.0
    for _ in range(3):
        with pytest.raises(ConfigError, match="bad"):
            watched.now()
    assert len(tries) == 2
    file.write_text("good")
    clock[0] = 4.0
    assert watched.now().is_operator("x")
