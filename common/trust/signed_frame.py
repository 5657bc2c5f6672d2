"""A site's answers under its identity: each is signed over federation, kind, run, round, name and bytes.

So a name is whose key it is: no member answers as another, and no answer stands for another run, kind or round. A
refusal is not signed; it holds a code and a reference, and whoever can drop an answer can forge one.
"""

from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import AuthError
from common.frame import wire
from common.frame.records import SIGNED
from common.frame.wire import Frame
from common.trust import identity

PURPOSE: Final = "answer"
SIGNER, SIGNATURE = SIGNED


def sign(frame: Frame, *, key: Ed25519PrivateKey, federation: str) -> Frame:
    """The frame with its signer and signature in the head.

    Args:
        frame: All that leaves; its head names site, run and, but when a run is opened, the round.
    """
    made_by = identity.public_hex(key)
    unsigned = frame.with_head({**frame.head, SIGNER: made_by, SIGNATURE: ""})
    signature = identity.sign(key, _bytes(unsigned, federation), purpose=PURPOSE)
    return unsigned.with_head({**unsigned.head, SIGNATURE: signature})


def check(frame: Frame, *, key: str, federation: str) -> None:
    """Return only if this key signed this frame for this federation.

    Raises:
        AuthError: It is not signed, by another key, or anything in it was changed.
    """
    made_by, signature = (str(frame.head.get(name, "")) for name in SIGNED)
    site = wire.shown(frame.head.get("site", ""))
    if not made_by:
        raise AuthError(f"an answer in the name of '{site}' is not signed, as every answer of that site is")
    if made_by != key:
        raise AuthError(f"an answer in the name of '{site}' is signed by another key than that site's")
    identity.verify(key, signature, _bytes(frame, federation), purpose=PURPOSE)


def _bytes(frame: Frame, federation: str) -> bytes:
    """What is signed: everything but the signature; of the body its hash."""
    head = {**frame.head, SIGNATURE: ""}
    body = frame.body_sha256.hex()
    return wire.canonical_json({"federation": federation, "kind": frame.kind, "head": head, "body_sha256": body})
