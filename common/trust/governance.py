"""The members whose signatures a federation's roster and kits need, m of n; what every site pins once and for all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from common.errors import AuthError, ConfigError
from common.frame import wire
from common.trust import identity

MAX_KEYS: Final = 64
MAX_FILE_BYTES: Final = 1 << 22
HEX_KEY: Final = r"^[0-9a-f]{64}$"
SLUG: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
HexKey = Annotated[str, Field(pattern=HEX_KEY)]
Slug = Annotated[str, Field(pattern=SLUG)]
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Governance:
    """Who governs a federation.

    Attributes:
        federation_id: The federation's name.
        quorum: How many signatures of different keys are needed.
        keys: The members' Ed25519 public keys, in hex.
        root_sha256: SHA-256 of the root certificate (DER), in hex: whom TLS trusts is pinned with them.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    federation_id: Slug
    quorum: Annotated[int, Field(ge=1, le=MAX_KEYS)]
    keys: Annotated[tuple[HexKey, ...], Field(min_length=1, max_length=MAX_KEYS)]
    root_sha256: HexKey

    def to_bytes(self) -> bytes:
        """Canonical bytes; the order of the keys does not matter."""
        return wire.canonical_json({**vars(self), "keys": sorted(self.keys)})

    @property
    def words(self) -> str:
        """Six words by which a site's admin knows the right federation."""
        return identity.words(self.to_bytes())

    def verify(self, data: bytes, signatures: Mapping[str, str], *, purpose: str) -> None:
        """Check that enough members signed.

        Args:
            signatures: Public key to signature, both in hex. Keys that are no member's do not count.

        Raises:
            AuthError: Fewer valid signatures of different members than the quorum.
        """
        num_valid = sum(_is_valid(key, signatures, data, purpose) for key in sorted(set(self.keys)))
        if num_valid < self.quorum:
            raise AuthError(
                f"the {purpose} of {self.federation_id} has {num_valid} valid signatures of governance keys and needs "
                f"{self.quorum}; ask the coordinator for one that is signed"
            )

    def sign(self, data: bytes, keys: Sequence[Ed25519PrivateKey], *, purpose: str) -> dict[str, str]:
        """Sign with the members' keys that are at hand.

        Raises:
            ConfigError: A key is no member's, or they are fewer different ones than the quorum.
        """
        return {identity.public_hex(key): identity.sign(key, data, purpose=purpose) for key in self.members(keys)}

    def members(self, keys: Sequence[Ed25519PrivateKey]) -> list[Ed25519PrivateKey]:
        """The different keys among these, which must all be members' and a quorum.

        Raises:
            ConfigError: A key is no member's, or they are fewer different ones than the quorum.
        """
        named = {self.member(key): key for key in keys}
        if len(named) < self.quorum:
            raise ConfigError(
                f"{len(named)} governance keys given, {self.federation_id} needs {self.quorum} different ones; "
                "repeat --governance KEYFILE, or collect signatures one by one with --propose FILE"
            )
        return list(named.values())

    def member(self, key: Ed25519PrivateKey) -> str:
        """The public half of a member's key.

        Raises:
            ConfigError: It is no member's.
        """
        public = identity.public_hex(key)
        if public not in self.keys:
            raise ConfigError(f"key {public[:16]} does not govern {self.federation_id}; give a governance key")
        return public


def check(found: Governance) -> Governance:
    """Refuse a governance that contradicts itself; returns it.

    Raises:
        AuthError: A key is listed twice, or the quorum is larger than the number of keys.
    """
    if len(set(found.keys)) != len(found.keys) or not 1 <= found.quorum <= len(found.keys):
        raise AuthError(
            f"the governance of {found.federation_id} lists a key twice, or asks for {found.quorum} of "
            f"{len(found.keys)} keys"
        )
    return found


def load(path: Path) -> Governance:
    """Read what was pinned.

    Raises:
        ConfigError: The file cannot be read.
        AuthError: It is not in canonical form, has unknown fields, or contradicts itself.
    """
    return check(parse(read(path), TypeAdapter(Governance), name=str(path)))


def read(path: Path) -> bytes:
    """Read a signed or pinned file.

    Raises:
        ConfigError: It cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; check the path")
    return data


def parse(data: bytes, adapter: TypeAdapter[Parsed], *, name: str) -> Parsed:
    """Canonical JSON to a typed value: strict types, no unknown or repeated field.

    Args:
        adapter: Of a dataclass that forbids extra fields.

    Raises:
        AuthError: The bytes are anything else.
    """
    try:
        fields = json.loads(data, object_pairs_hook=wire.unique_pairs)
        is_canonical = wire.canonical_json(fields) == data
        parsed = adapter.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = wire.shown(".".join(map(str, first["loc"])))
        raise AuthError(f"{name}: {place or 'the file'}: {wire.shown(first['msg'], limit=120)}") from None
    except (ValueError, RecursionError) as error:
        raise AuthError(f"{name} is not strict JSON; fetch it again") from error
    if not is_canonical:
        raise AuthError(f"{name} is not in canonical form, so it was edited or damaged; fetch it again")
    return parsed


def _is_valid(key: str, signatures: Mapping[str, str], data: bytes, purpose: str) -> bool:
    """Whether this member signed; used for counting only."""
    try:
        identity.verify(key, signatures.get(key, ""), data, purpose=purpose)
    except AuthError:
        return False
    return True
