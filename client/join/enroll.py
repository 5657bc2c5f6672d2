"""A site's keys, made at the site, and its request to join or to renew. No private key ever leaves its folder."""

from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from common import keyfile, storage
from common.errors import ConfigError
from common.trust import certs, identity, request
from common.trust.governance import Slug
from common.trust.request import Statement

IDENTITY_KEY: Final = "identity.key"
NODE_KEY: Final = "node.key"
TLS_KEY: Final = "tls.key"
NEXT_TLS_KEY: Final = "tls-next.key"
REQUEST: Final = "request.json"
RENEWAL: Final = "renewal.json"


def enroll(folder: Path, *, federation_id: str, name: str) -> Statement:
    """Make a site's three keys and its request.

    Args:
        folder: For keys and request, mode 0700; holds no keys yet.

    Returns:
        What is asked for; its words are read out to the coordinator.

    Raises:
        ConfigError: A name is not fit, keys are there already, or others may write in the folder.
        StorageError: The disk is full and the like.
    """
    for what, value in (("--federation", federation_id), ("--name", name)):
        try:
            TypeAdapter(Slug).validate_python(value)
        except ValidationError:  # it could not stand in a certificate
            raise ConfigError(f"{what}: 1 to 63 of a-z, 0-9 and -, with no - at either end") from None
    keyfile.folder(folder)
    statement, data = request.make(
        federation_id,
        name,
        identity_key=identity.create(folder / IDENTITY_KEY),
        node_key=certs.create_node_key(folder / NODE_KEY),
        tls_key=certs.create_tls_key(folder / TLS_KEY),
    )
    storage.write_atomic(folder / REQUEST, data)
    return statement


def renew(folder: Path) -> Statement:
    """Make the next TLS key, and a request for its certificate that the identity key signs.

    A key that an earlier call made and that is not in use yet is asked for again.

    Raises:
        ConfigError: A key or the first request is missing, or a key file's mode is not 0600.
        StorageError: The disk is full and the like.
    """
    first = own_statement(folder)
    following = folder / NEXT_TLS_KEY
    statement, data = request.make(
        first.federation_id,
        first.name,
        identity_key=identity.load(folder / IDENTITY_KEY),
        node_key=certs.load_key(folder / NODE_KEY),
        tls_key=certs.load_key(following) if following.exists() else certs.create_tls_key(following),
        replaces=certs.fingerprint(certs.load_key(folder / TLS_KEY).public_key()),
    )
    storage.write_atomic(folder / RENEWAL, data)
    return statement


def own_statement(folder: Path) -> Statement:
    """What this site asked for when it enrolled.

    Raises:
        ConfigError: There is no request.
        AuthError: It was altered.
    """
    path = folder / REQUEST
    try:
        return request.parse(path.read_bytes(), name=str(path)).statement
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); run silotune-client enroll first") from error
