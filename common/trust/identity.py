"""Ed25519 identities: who a site or a governance member is, independent of certificates; and words to compare keys by.

A signature covers `silotune/v1/PURPOSE` and a zero byte before the data, so that one made for a roster can never pass
for one of a manifest.
"""

import hashlib
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common import keyfile
from common.errors import AuthError, ConfigError

NUM_WORDS: Final = 6
WORD_BITS: Final = 16
_DOMAIN: Final = b"silotune/v1/"
_CONSONANTS: Final = "bdfghjklmnprstvz"
_VOWELS: Final = "aiou"


def create(path: Path) -> Ed25519PrivateKey:
    """Make a key and write it as PEM (PKCS 8, not encrypted), mode 0600.

    Raises:
        ConfigError: The file is there already, or others may write in its folder.
        StorageError: It cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8
    keyfile.write(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return key


def load(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        ConfigError: The file is missing, its mode is not 0600, its owner is somebody else, or it holds no Ed25519 key.
    """
    try:
        key = serialization.load_pem_private_key(keyfile.read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # not chained: the text could hold parts of the key
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds no unencrypted Ed25519 private key in PEM form; give the identity key's file")
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half: 64 digits of 0-9 and a-f."""
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, data: bytes, *, purpose: str) -> str:
    """Sign bytes for one purpose; returns 128 hexadecimal digits.

    Args:
        purpose: What the bytes are, such as `roster`; the verifier must ask for the same.

    Raises:
        ValueError: The purpose is empty or holds other than printable ASCII characters.

    Source: RFC 8032, Ed25519.
    """
    return key.sign(bound(data, purpose)).hex()


def verify(public_key: str, signature: str, data: bytes, *, purpose: str) -> None:
    """Check a signature; returns only if it is right.

    Raises:
        AuthError: Another key, other bytes or another purpose; or key or signature are malformed.

    Example:
        >>> key = Ed25519PrivateKey.generate()
        >>> verify(public_hex(key), sign(key, b"roster bytes", purpose="roster"), b"roster bytes", purpose="roster")
    """
    try:
        raw_key, raw_signature = bytes.fromhex(public_key), bytes.fromhex(signature)
        if (raw_key.hex(), raw_signature.hex()) != (public_key, signature):
            raise ValueError("not in canonical form")
        Ed25519PublicKey.from_public_bytes(raw_key).verify(raw_signature, bound(data, purpose))
    except (ValueError, InvalidSignature) as error:
        raise AuthError(f"the {purpose} signature of key {public_key[:16]!r} is not valid") from error


def words(data: bytes) -> str:
    """Six words that two people compare by telephone: the first 96 bits of SHA-256, 16 bits a word.

    To find other data with the same words takes 2^96 tries.

    Returns:
        Six words of five letters with spaces between them.

    Source: Wilkerson 2009, arXiv:0901.4016 (proquints: consonant, vowel, consonant, vowel, consonant).

    Example:
        >>> words(b"")
        'tidog jojal gurij kurat rusir lodol'
    """
    digest = hashlib.sha256(bound(data, "words")).digest()
    size = WORD_BITS // 8
    return " ".join(_word(int.from_bytes(digest[i : i + size], "big")) for i in range(0, NUM_WORDS * size, size))


def check_words(data: bytes, given: str) -> None:
    """Compare words that somebody read out; case, and hyphens or commas between words, do not matter.

    Raises:
        AuthError: They are not the words of `data`.
    """
    said = given.lower().replace("-", " ").replace(",", " ").split()
    if said != words(data).split():
        raise AuthError("the words are not those of this file: it was altered, or is another one; compare them again")


def _word(number: int) -> str:
    """Sixteen bits as five letters.

    Example:
        >>> _word(0x7F00), _word(0x0001)
        ('lusab', 'babad')
    """
    parts = (_CONSONANTS[number >> 12], _VOWELS[number >> 10 & 3], _CONSONANTS[number >> 6 & 15])
    return "".join((*parts, _VOWELS[number >> 4 & 3], _CONSONANTS[number & 15]))


def bound(data: bytes, purpose: str) -> bytes:
    """The bytes that are signed: domain, purpose, zero byte, data.

    Raises:
        ValueError: The purpose is empty or holds other than printable ASCII characters.
    """
    if not purpose or not purpose.isascii() or not purpose.isprintable():
        raise ValueError("a purpose is printable ASCII")
    return _DOMAIN + purpose.encode() + b"\0" + data
