"""A kit that brings more than a kit: pins, private keys and other files for a site's own folder of keys."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from common.errors import AuthError, ConfigError
from common.trust import identity, kit
from tests.samples.federations import seal, start


def planted(federation, tmp_path, *, name: str = "alder") -> tuple[Path, Path]:
    """An impostor's kit, and what it would leave in the site's folder of keys: a pin, an epoch and private keys."""
    impostor = start(tmp_path / "evil")
    change = impostor.join(name)
    forged = impostor.unpack(change, tmp_path / "evil" / "kits")
    impostor.install(forged, name)
    return Path(change.kit), impostor.keys(name)


def test_words_that_were_heard_are_checked_whatever_is_pinned_already(federation, offered, tmp_path):
    """Control: without the words nothing tells the planted pin from a site's own."""
    forged, evil_keys = planted(federation, tmp_path)
    keys = federation.keys("alder")
    for path in evil_keys.iterdir():  # as `tar xf` beside keys/ would have done it
        shutil.copy(path, keys / path.name)
    with pytest.raises(AuthError, match="compare them again"):
        federation.install(forged, "alder")
    assert federation.install(forged, "alder", words="").epoch == 2  # control


def test_a_pin_that_came_alone_is_no_pin(federation, offered, tmp_path):
    forged, evil_keys = planted(federation, tmp_path)
    shutil.copy(evil_keys / "federation.json", federation.keys("alder"))
    with pytest.raises(ConfigError, match="six words"):
        federation.install(forged, "alder", words="")
    with pytest.raises(AuthError, match="compare them again"):
        federation.install(forged, "alder")
    with pytest.raises(AuthError, match="of another federation than the words"):
        federation.install(offered, "alder")


def test_a_kits_tar_file_is_installed_and_writes_nothing_else(federation, offered, tmp_path):
    kit_file = federation.folder / "kits" / "alder.tar"
    before = {path.name for path in federation.keys("alder").iterdir()}
    assert federation.install(kit_file, "alder").name == "alder"
    made = {path.name for path in federation.keys("alder").iterdir()} - before
    assert made == kit.NAMES - {kit.SUMS, kit.SIGNATURES} | {"epoch.json"}


def spoiled(sound: Path, target: Path, *entries: tuple[str, bytes | str]) -> Path:
    """A kit's tar file with more in it; a text makes a link to that place."""
    with tarfile.open(sound) as old, tarfile.open(target, "w") as new:
        for entry in old:
            new.addfile(entry, old.extractfile(entry))
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            if isinstance(data, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, data
                new.addfile(entry)
            else:
                entry.size = len(data)
                new.addfile(entry, io.BytesIO(data))
    return target


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (("keys/federation.json", b"{}"), "no part of a kit|is no kit"),
        (("keys/identity.key", b"key"), "brings a private key"),
        (("alder/tls.key", b"key"), "brings a private key"),
        (("alder/epoch.json", b"{}"), "no part of a kit"),
        (("alder/request.json", b"{}"), "no part of a kit"),
        (("alder/../keys/site.pem", b""), "no part of a kit"),
        (("/etc/passwd", b""), "no part of a kit"),
        (("alder/site.pem", b"again"), "no part of a kit"),
        (("alder/policy.toml", "../keys/policy.toml"), "no part of a kit"),
        (("alder/node.toml.sig", b""), "no part of a kit"),
    ],
)
def test_a_kit_that_brings_more_than_a_kit_is_refused(federation, offered, tmp_path, entry, told):
    """Control: tar writes the same entry where it says."""
    keys, sound = federation.keys("alder"), federation.folder / "kits" / "alder.tar"
    bad = spoiled(sound, tmp_path / "bad.tar", entry)
    before = {path: path.read_bytes() for path in keys.iterdir()}
    with pytest.raises(AuthError, match=told):
        federation.install(bad, "alder")
    assert {path: path.read_bytes() for path in keys.iterdir()} == before
    with tarfile.open(bad) as archive:
        assert entry[0] in archive.getnames()
    federation.install(sound, "alder")


def test_tar_itself_would_write_over_a_sites_keys(federation, offered, tmp_path):
    """Why a kit is not unpacked by hand: the control of the tests above."""
    sound = federation.folder / "kits" / "alder.tar"
    bad = spoiled(sound, tmp_path / "bad.tar", ("keys/identity.key", b"planted"))
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "identity.key").write_bytes(b"own")
    subprocess.run(["tar", "xf", str(bad)], cwd=tmp_path, check=True)
    assert (tmp_path / "keys" / "identity.key").read_bytes() == b"planted"


def test_a_signed_kit_with_a_name_of_its_own_is_refused(federation, offered, tmp_path):
    """The governance of a federation can sign any list; a site takes the names that it knows."""
    pinned, keys = federation.pinned, [identity.load(path) for path in federation.members[:2]]
    files = {path.name: path.read_bytes() for path in offered.iterdir() if not path.name.startswith(kit.SUMS)}
    for name in ("identity.key", "epoch.json", "own.service"):
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        (tmp_path / "own").mkdir()
        for file, data in seal({**files, name: b"x"}, keys, pinned=pinned).items():
            (tmp_path / "own" / file).write_bytes(data)
        with pytest.raises(AuthError, match="is no part of a kit of this release"):
            federation.install(tmp_path / "own", "alder")


def test_the_closed_list_is_what_the_coordinator_makes(offered):
    assert {path.name for path in offered.iterdir()} == kit.NAMES
