"""Which runs an operator may start: those of a listed bundle, sent whole and with nothing else beside it."""

import hashlib
from collections.abc import Sequence
from typing import Final

from flwr.proto.control_pb2 import StartRunRequest
from google.protobuf.message import DecodeError

from server.gateway.refusals import Refused
from server.run import link

_FIELDS: Final = {"fab", "override_config"}
_BUNDLE_FIELDS: Final = {"hash_str", "content"}


def allowed(listed: Sequence[str]) -> frozenset[str]:
    """The hashes in the setting `control.bundles`; where it has none, that of this version's own bundle.

    Example:
        >>> len(allowed(()))
        1
    """
    return frozenset(listed) or frozenset({hashlib.sha256(link.build_bundle()).hexdigest()})


def check_start(body: bytes, *, bundles: frozenset[str]) -> bytes:
    """Check a request to start a run.

    Args:
        bundles: SHA-256 of the bundles that may be started.

    Returns:
        The request without fields that this version does not know.

    Raises:
        Refused: 400 if it cannot be read; 403 for a Hub or stored app, a bundle that is not listed, or any field beside
            bundle and run config.
    """
    request = StartRunRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        raise Refused(400, "start_run_malformed") from None
    request.DiscardUnknownFields()
    if request.app_spec or not request.fab.content:
        raise Refused(403, "bundle_by_reference")
    if not _names(request) <= _FIELDS or not _names(request.fab) <= _BUNDLE_FIELDS:
        raise Refused(403, "start_run_field")
    if hashlib.sha256(request.fab.content).hexdigest() not in bundles:
        raise Refused(403, "bundle_not_listed")
    return bytes(request.SerializeToString(deterministic=True))


def _names(message: object) -> set[str]:
    """Names of the fields that are set."""
    return {descriptor.name for descriptor, _ in message.ListFields()}  # type: ignore[attr-defined]
