"""The run manifest: a run as data, signed. A site acts on this and on nothing else that a coordinator sends."""

import datetime
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import AuthError, ConfigError, WireError
from common.frame import wire
from common.frame.records import TensorSpec, from_head, to_head
from common.frame.wire import Frame
from common.run import config
from common.run.plan import Plan
from common.run.schema import precisions
from common.run.schema.model import BY_HASH
from common.run.schema.section import SHA256
from common.storage import storage_error
from common.trust import identity

VERSION: Final = 5
MAX_BYTES: Final = 4 << 20
PURPOSE: Final = "manifest"
ROSTER_EPOCH: Final = "roster_epoch"  # of an offer's head
MAX_EPOCH: Final = 1 << 53  # as in common/trust/roster.py
MAX_OFFER_S: Final = 366 * 86_400  # longest life of an offer, from when a site looks at it
_CODES: Final = {True: re.compile("[0-9a-f]{64}"), False: re.compile("")}  # by whether weights are 4-bit codes
_UNTOLD: Final = {"server_data": "", "tasks": (), "tasks_every_rounds": 0}


@dataclass(frozen=True)
class RunManifest:
    """What a site must know of a run, and may check before it takes part.

    Attributes:
        run: The resolved run file without what is the coordinator's own affair.
        base_sha256: Hash of the base model's files.
        tensor_specs: The adapter's tensors: exactly these go down and come back.
        codes_sha256: Hash of the base's 4-bit codes (`common.model.codes`), of the sites that hold it so; empty where
        nobody
            does.
        evaluation_sha256: Hash of what the coordinator measures, rows included (`server/evaluate/suite.py`), fixed
            before training; empty where it measures nothing of its own.
        date: Day on which the run was launched, YYYY-MM-DD, which its chat template prints wherever it is rendered;
            empty where the template prints none.
    """

    run: config.RunConfig
    base_sha256: str
    tensor_specs: tuple[TensorSpec, ...]
    codes_sha256: str = ""
    evaluation_sha256: str = ""
    date: str = ""

    def to_bytes(self) -> bytes:
        """Canonical bytes; the same manifest always gives the same."""
        tensors = [[spec.name, list(spec.shape)] for spec in self.tensor_specs]
        run = json.loads(config.resolved_json(public_part(self.run)))
        return wire.canonical_json(
            {
                "version": VERSION,
                "run": run,
                "base_sha256": self.base_sha256,
                "codes_sha256": self.codes_sha256,
                "tensors": tensors,
                "egress": self.plan.egress.as_dict(),
                "evaluation_sha256": self.evaluation_sha256,
                "date": self.date,
            }
        )

    def codes_at(self, site: str) -> str:
        """Hash of the 4-bit codes that a site must have; empty where its base has none."""
        return self.codes_sha256 if precisions.of_site(self.run.model, site) == "nf4" else ""

    @functools.cached_property
    def plan(self) -> Plan:
        """The run worked out: both ends derive the same from it."""
        return Plan.of(self.run, self.tensor_specs)

    @functools.cached_property
    def sha256(self) -> str:
        """The run's identity; travels in every message."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@dataclass(frozen=True)
class Signature:
    """Who offers a run, to which federation, until when.

    Attributes:
        federation: Id of the federation that the run is for.
        signer: The operator's public key, 64 hexadecimal digits.
        not_after: Unix seconds; later, no site opens the run.
        signature: Of manifest, federation and date, 128 hexadecimal digits.
    """

    federation: str
    signer: str
    not_after: int
    signature: str


@dataclass(frozen=True)
class Offer:
    """A manifest on its way to a site.

    Attributes:
        manifest: Its canonical bytes.
        signature: None in a simulation.
        roster_epoch: Of the roster by which the coordinator knows the sites; 0: it reads none. Nobody signed it: it
            only says what a site with an older roster should fetch.
    """

    manifest: bytes
    signature: Signature | None = None
    roster_epoch: int = 0

    @property
    def sha256(self) -> str:
        """The run's identity."""
        return hashlib.sha256(self.manifest).hexdigest()

    def to_frame(self) -> Frame:
        """The request to open the run."""
        epoch = {ROSTER_EPOCH: self.roster_epoch} if self.roster_epoch else {}
        return Frame("open", {**(to_head(self.signature) if self.signature else {}), **epoch}, self.manifest)


def sign(manifest: RunManifest, key: Ed25519PrivateKey, *, federation: str, not_after: int) -> Offer:
    """Offer a run to a federation's sites until a date (Unix seconds)."""
    data = manifest.to_bytes()
    signer = identity.public_hex(key)
    statement = _statement(data, federation=federation, signer=signer, not_after=not_after)
    return Offer(data, Signature(federation, signer, not_after, identity.sign(key, statement, purpose=PURPOSE)))


def check_signature(offer: Offer) -> Signature:
    """Whoever is named as signer has signed this very offer; whether a site trusts them is the site's to say.

    Raises:
        AuthError: Unsigned, altered, or signed by another key.
    """
    if offer.signature is None:
        raise AuthError("the run's manifest is not signed; the coordinator must sign it with an operator's key")
    made = offer.signature
    statement = _statement(offer.manifest, federation=made.federation, signer=made.signer, not_after=made.not_after)
    identity.verify(made.signer, made.signature, statement, purpose=PURPOSE)
    return made


def read_offer(frame: Frame) -> Offer:
    """The offer in a request to open a run; the manifest is not parsed yet.

    Raises:
        WireError: Too long, or a head with anything but a signature and the epoch of a roster.
    """
    if len(frame.body) > MAX_BYTES:
        raise WireError(f"run manifest of {len(frame.body)} bytes; the limit is {MAX_BYTES}")
    head = dict(frame.head)
    epoch = head.pop(ROSTER_EPOCH, 0)
    if type(epoch) is not int or not 0 <= epoch <= MAX_EPOCH:
        raise WireError(f"{ROSTER_EPOCH} is no number of 0 to {MAX_EPOCH}")
    return Offer(bytes(frame.body), from_head(Signature, head) if head else None, epoch)


def _statement(manifest: bytes, *, federation: str, signer: str, not_after: int) -> bytes:
    """What is signed."""
    digest = hashlib.sha256(manifest).hexdigest()
    return wire.canonical_json(
        {"manifest_sha256": digest, "federation": federation, "signer": signer, "not_after": not_after}
    )


def public_part(run: config.RunConfig) -> config.RunConfig:
    """The run file with paths of the coordinator's machine left out."""
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"base": BY_HASH}),
            "data": run.data.model_copy(update={"source": "site"}),
            "evaluation": run.evaluation.model_copy(update=_UNTOLD),
            "gate": config.GateConfig(),
            "export": config.ExportConfig(),
            "output": config.OutputConfig(),
            "polish": (),
        }
    )


def date_of(file: Path | None, *, today: datetime.date) -> str:
    """The day that a run's chat template prints, YYYY-MM-DD: of a run that goes on that of its launch.

    Args:
        file: The manifest of a run that goes on, which may not have been written; None: it is launched now.
        today: Day of a launch.

    Raises:
        WireError: The manifest was changed.
        StorageError: It cannot be read.
    """
    try:
        found = parse(file.read_bytes()).date if file and file.exists() else ""
    except OSError as error:
        raise storage_error(file or Path(), error) from error
    return found or today.isoformat()


@functools.lru_cache(maxsize=2)
def parse(data: bytes) -> RunManifest:
    """Bytes to manifest; they must be the canonical ones.

    Kept for the bytes that came last: a thousand virtual sites then hold one manifest between them.

    Raises:
        WireError: Not a manifest of this version, an unknown setting, or not in canonical form.
    """
    try:
        fields = json.loads(data, object_pairs_hook=wire.unique_pairs)
        manifest = _from_fields(fields)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, ConfigError) as error:
        raise WireError(f"not a run manifest of version {VERSION} ({type(error).__name__})") from error
    if manifest.to_bytes() != data:
        raise WireError("run manifest was changed, or is of another version of silotune; use the version that wrote it")
    return manifest


def _from_fields(fields: dict[str, Any]) -> RunManifest:
    """Typed fields; whatever is lost or added here shows as a difference to the canonical bytes."""
    if fields["version"] != VERSION:
        raise ValueError("version")
    specs = tuple(TensorSpec(str(name), tuple(int(size) for size in shape)) for name, shape in fields["tensors"])
    run, digest = config.RunConfig.model_validate(fields["run"]), str(fields["codes_sha256"])
    if not _CODES["nf4" in precisions.used(run.model)].fullmatch(digest):
        raise WireError(
            f"not a run manifest of version {VERSION}: codes_sha256 must be a hash where a base is nf4, and empty else"
        )
    if not re.fullmatch(SHA256, fields["evaluation_sha256"]):
        raise ValueError("evaluation_sha256")
    if fields["date"] and datetime.date.fromisoformat(fields["date"]).isoformat() != fields["date"]:
        raise ValueError("date")
    return RunManifest(run, str(fields["base_sha256"]), specs, digest, fields["evaluation_sha256"], str(fields["date"]))
