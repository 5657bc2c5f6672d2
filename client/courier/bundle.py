"""The Flower bundles that a courier may run, by hash: this release's own, which names installed code and has none.

A SuperNode runs whatever bundle it is sent. The link is the site's own program on the way there, so it looks.
"""

import hashlib
from collections.abc import Collection
from typing import Final

from flwr.proto.fab_pb2 import Fab, GetFabResponse
from google.protobuf.message import DecodeError

from common.errors import AuthError

PATH: Final = b"/v1/fleet/get-fab"
MAX_BYTES: Final = 1 << 20
SHA256: Final = "e1cfb6af230a944222bae23ee36a60fc64cc175c758f75da2202073b8d9fb5ff"  # server.run.link.build_bundle()


def check(answer: bytes, *, allowed: Collection[str]) -> bytes:
    """Let an answer of the SuperLink through if the bundle in it is allowed.

    Returns:
        The same answer with the bundle and its hash only.

    Raises:
        AuthError: Another bundle, or bytes that hold none.
    """
    try:
        content = GetFabResponse.FromString(answer).fab.content
    except DecodeError:
        raise AuthError("what came is no bundle; it was not handed on") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 not in allowed:
        raise AuthError(
            f"bundle {sha256} is not allowed here and was not handed on; if the coordinator runs another release, "
            "install that one, or read the bundle and start the link with --bundle HASH"
        )
    return bytes(GetFabResponse(fab=Fab(hash_str=sha256, content=content)).SerializeToString(deterministic=True))
