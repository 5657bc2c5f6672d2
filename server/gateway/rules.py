"""Which requests pass, as plain functions of path, header and members. Each refusal names its rule.

Facts about Flower are those of 1.41: the paths are in `flwr/supercore/protobuf/translation.py`, the node's headers in
`flwr/superlink/routers/fleet/node_auth.py`.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from common.trust import roster
from server.gateway import members
from server.gateway.members import Members, Site
from server.gateway.refusals import Refused

Headers = Sequence[tuple[bytes, bytes]]

# All of Flower's but register-node and unregister-node: the coordinator registers nodes.
FLEET_PATHS: Final = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run"),
        *("get-fab", "push-object", "pull-object", "confirm-message-received"),
    )
)
PULL_MESSAGES: Final = "/v1/fleet/pull-messages"
PUSH_MESSAGES: Final = "/v1/fleet/push-messages"
PUSH_OBJECT: Final = "/v1/fleet/push-object"
ACTIVATE_NODE: Final = "/v1/fleet/activate-node"
UNKNOWN_NODE: Final = 412  # Flower's answer to it where the key is not registered, or the node is online already
SITE_PATHS: Final = frozenset({roster.PATH, roster.STANDING_PATH})  # which the gateway answers itself
START_RUN: Final = "/v1/control/start-run"
STREAM_LOGS: Final = "/v1/control/stream-logs"
# What `server/run/link.py` calls.
CONTROL_PATHS: Final = frozenset(
    {START_RUN, STREAM_LOGS, "/v1/control/list-runs", "/v1/control/list-nodes", "/v1/control/register-node"}
)
MAX_HEADERS: Final = 64
MAX_SMALL_BODY_BYTES: Final = 256 << 10  # ids and dates; an announced answer names each of its pieces
NODE_KEY: Final = b"flwr-public-key"
_FORWARDED: Final = (b"content-type", b"accept")
_FORWARDED_PREFIX: Final = b"flwr-"
_RETURNED: Final = (b"content-type", b"content-length")


@dataclass(frozen=True)
class Body:
    """How a request's body comes.

    Attributes:
        size_bytes: Its length; None: it comes in chunks, its length is not known.
    """

    size_bytes: int | None


def check_path(method: str, raw_path: bytes, query: bytes, *, allowed: frozenset[str]) -> str:
    """Return the path if it is listed, byte for byte.

    Raises:
        Refused: 404 for any other path, and for a query; 405 for another method than POST.

    Example:
        >>> check_path("POST", b"/v1/fleet/get-run", b"", allowed=FLEET_PATHS)
        '/v1/fleet/get-run'
    """
    path = raw_path.decode("latin-1")
    if path not in allowed or query:
        raise Refused(404, "path")
    if method != "POST":
        raise Refused(405, "method")
    return path


def max_body_bytes(path: str, most: int) -> int:
    """Largest body on a path: pieces of arrays and a run's bundle are large, nothing else is.

    Example:
        >>> max_body_bytes(PUSH_OBJECT, 8 << 20) >> 20, max_body_bytes(PULL_MESSAGES, 8 << 20) >> 10
        (8, 256)
    """
    return most if path in (PUSH_OBJECT, START_RUN) else min(most, MAX_SMALL_BODY_BYTES)


def check_headers(headers: Headers, *, max_bytes: int, max_body_bytes: int) -> Body:
    """Check size and number of headers, and how the body is framed.

    Raises:
        Refused: 431 for too many or too long headers; 400 for a body that is compressed or framed twice; 413 for one
            whose declared length is above the limit; 411 for one with neither a length nor chunks.
    """
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > max_bytes:
        raise Refused(431, "header_size")
    if any(value.strip().lower() != b"identity" for value in _all(headers, b"content-encoding")):
        raise Refused(400, "compressed")
    lengths, codings = _all(headers, b"content-length"), _all(headers, b"transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise Refused(400, "content_length")
    if codings:
        return Body(None)
    if not lengths:
        raise Refused(411, "content_length")
    if not lengths[0].isdigit() or len(lengths[0]) > 15:
        raise Refused(400, "content_length")
    if int(lengths[0]) > max_body_bytes:
        raise Refused(413, "body_size")
    return Body(int(lengths[0]))


def check_site(headers: Headers, fingerprint: str, *, known: Members) -> str:
    """Tie a request to a site: its certificate's key and its node key must be of the same roster entry.

    Returns:
        The site's name.

    Raises:
        Refused: 403.
    """
    site = check_certificate(fingerprint, known=known)
    if node_key_of(headers) != site.node_key:
        raise Refused(403, "node_key_other")
    return site.name


def check_certificate(fingerprint: str, *, known: Members) -> Site:
    """The site that a certificate's key belongs to: enough for what the gateway answers itself.

    Raises:
        Refused: 403.
    """
    site = known.site_of(fingerprint)
    if site is None:
        raise Refused(403, _reason(fingerprint, known))
    return site


def check_operator(fingerprint: str, *, known: Members) -> str:
    """Raise Refused (403) unless the certificate's key is an operator's; returns the key, by which he is known."""
    if not known.is_operator(fingerprint):
        raise Refused(403, _reason(fingerprint, known))
    return fingerprint


def node_key_of(headers: Headers) -> str:
    """Fingerprint of the node key that a request names: SHA-256 of its SubjectPublicKeyInfo in DER.

    Only the text is taken apart; that the caller holds the key is for the SuperLink to check.

    Raises:
        Refused: 403: there is no such header, more than one, or it is not base64 of a PEM public key.
    """
    values = _all(headers, NODE_KEY)
    if not values:
        raise Refused(403, "node_key_missing")
    if len(values) > 1:
        raise Refused(403, "node_key_malformed")
    try:
        return members.node_key_fingerprint(base64.b64decode(values[0], validate=True))
    except ValueError:
        raise Refused(403, "node_key_malformed") from None


def forwarded(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers that the SuperLink gets; the connection and the body's framing are made anew."""
    kept = [(name, value) for name, value in headers if name in _FORWARDED or name.startswith(_FORWARDED_PREFIX)]
    return [*kept, (b"accept-encoding", b"identity")]


def returned(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers that the caller gets back."""
    lower = [(name.lower(), value) for name, value in headers]
    return [(name, value) for name, value in lower if name in _RETURNED or name.startswith(_FORWARDED_PREFIX)]


def _all(headers: Headers, name: bytes) -> list[bytes]:
    """All values of one header."""
    return [value for key, value in headers if key == name]


def _reason(fingerprint: str, known: Members) -> str:
    """Why a certificate is not let in."""
    return "revoked" if fingerprint in known.revoked else "not_in_roster"
