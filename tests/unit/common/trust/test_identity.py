import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import keyfile
from common.errors import AuthError, ConfigError
from common.trust import identity

ROOT = Path(__file__).parents[4]


def test_a_key_is_written_for_its_owner_only_and_reads_back(tmp_path):
    path = tmp_path / "keys" / "identity.key"
    key = identity.create(path)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.parent.stat().st_mode & 0o7777 == 0o700
    assert identity.public_hex(identity.load(path)) == identity.public_hex(key)


def test_a_key_is_written_with_no_more_rights_under_any_umask(tmp_path):
    before = os.umask(0)
    try:
        identity.create(tmp_path / "identity.key")
    finally:
        os.umask(before)
    assert (tmp_path / "identity.key").stat().st_mode & 0o7777 == 0o600


def test_a_key_is_never_overwritten(tmp_path):
    key = identity.create(tmp_path / "identity.key")
    with pytest.raises(ConfigError, match="never overwritten"):
        identity.create(tmp_path / "identity.key")
    assert identity.public_hex(identity.load(tmp_path / "identity.key")) == identity.public_hex(key)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o700, 0o400])
def test_a_key_file_of_another_mode_is_refused(tmp_path, mode):
    path = tmp_path / "identity.key"
    identity.create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"run: chmod 600 {path}"):
        identity.load(path)
    path.chmod(0o600)
    identity.load(path)


def test_a_key_file_of_another_owner_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "identity.key"
    identity.create(path)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=f"belongs to another user.*chmod 600 {path}"):
        identity.load(path)
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    identity.load(path)


def test_a_folder_that_others_may_write_in_gets_no_key(tmp_path):
    folder = tmp_path / "keys"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=f"chmod 700 {folder}"):
        identity.create(folder / "identity.key")
    assert not list(folder.iterdir())
    folder.chmod(0o700)
    identity.create(folder / "identity.key")


def test_links_pipes_and_huge_files_are_no_key_files(tmp_path):
    identity.create(tmp_path / "identity.key")
    (tmp_path / "link").symlink_to(tmp_path / "identity.key")
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "huge").write_bytes(b"0" * (keyfile.MAX_BYTES + 1))
    (tmp_path / "huge").chmod(0o600)
    for name in ("link", "pipe", "huge", "missing"):
        with pytest.raises(ConfigError, match=name):
            identity.load(tmp_path / name)


def test_a_key_of_another_kind_is_refused_without_showing_it(tmp_path):
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-m", "PEM", "-N", "", "-f", tmp_path / "k"], check=True
    )
    for content in ((tmp_path / "k").read_bytes(), b"SECRET-BYTES"):
        (tmp_path / "k").write_bytes(content)
        with pytest.raises(ConfigError, match="holds no unencrypted Ed25519") as caught:
            identity.load(tmp_path / "k")
        assert "SECRET" not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.fixture
def key(tmp_path):
    return identity.create(tmp_path / "identity.key")


def test_a_signature_holds_for_its_key_bytes_and_purpose_only(key, tmp_path):
    public, other = identity.public_hex(key), identity.public_hex(identity.create(tmp_path / "other.key"))
    signature = identity.sign(key, b"bytes", purpose="roster")
    identity.verify(public, signature, b"bytes", purpose="roster")
    wrong = [
        (other, signature, b"bytes", "roster"),
        (public, signature, b"bytez", "roster"),
        (public, signature, b"bytes", "manifest"),
        (public, "00" * 64, b"bytes", "roster"),
        (public, signature.upper(), b"bytes", "roster"),
        (public, "", b"bytes", "roster"),
        (public, "zz", b"bytes", "roster"),
        ("", signature, b"bytes", "roster"),
        (public[:-2], signature, b"bytes", "roster"),
    ]
    for public_key, given, data, purpose in wrong:
        with pytest.raises(AuthError, match="is not valid"):
            identity.verify(public_key, given, data, purpose=purpose)


def test_purpose_and_bytes_cannot_be_shifted_into_each_other(key):
    signature = identity.sign(key, b"ab", purpose="x")
    with pytest.raises(AuthError):
        identity.verify(identity.public_hex(key), signature, b"b", purpose="xa")
    for purpose in ("", "a\0b", "é"):
        with pytest.raises(ValueError, match="printable ASCII"):
            identity.sign(key, b"", purpose=purpose)


def test_signatures_are_those_of_rfc_8032(key):
    """Section 7.1, test 2: the public key and signature of one byte, without our prefix."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    secret = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
    published = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    assert identity.public_hex(published) == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    raw = published.sign(b"silotune/v1/roster\0bytes").hex()
    assert identity.sign(published, b"bytes", purpose="roster") == raw


def test_words_are_proquints_of_the_hash():
    """Wilkerson 2009: 127.0.0.1 is lusab-babad, 63.84.220.193 is gutih-tugad."""
    published = {0x7F00: "lusab", 0x0001: "babad", 0x3F54: "gutih", 0xDCC1: "tugad"}
    assert {number: identity._word(number) for number in published} == published
    assert len({identity._word(number) for number in range(1 << identity.WORD_BITS)}) == 1 << identity.WORD_BITS
    assert identity.NUM_WORDS * identity.WORD_BITS >= 64


def test_words_as_people_write_them_are_accepted_and_others_refused():
    words = identity.words(b"request")
    assert len(words.split()) == 6
    for written in (words, words.upper(), words.replace(" ", "-"), f" {words.replace(' ', ',  ')}\n"):
        identity.check_words(b"request", written)
    for written in ("", words[:-6], words[:-1] + "x", identity.words(b"requesu"), f"{words} babad"):
        with pytest.raises(AuthError, match="compare them again"):
            identity.check_words(b"request", written)


def test_a_process_that_holds_a_key_is_not_dumped(tmp_path):
    """Control: before it has read one, it could be."""
    identity.create(tmp_path / "identity.key")
    program = (
        "import ctypes, resource, sys; from pathlib import Path; from common.trust import identity\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)\n"
        "def told(): return [ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)[0]]\n"
        "print(told()); identity.load(Path(sys.argv[1])); print(told())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "identity.key")]
    told = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout
    before, after = map(json.loads, told.splitlines())
    assert (before[0], after) == (1, [0, 0])
