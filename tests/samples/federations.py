"""A federation on disk for tests: provisioned, with sites that enrolled; and TLS handshakes in memory."""

import datetime
import shutil
import ssl
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.join import enroll, install
from client.join.install import Kit
from common.trust import kit
from common.trust.governance import Governance
from server.members import changes as admit
from server.members import founding
from server.members.changes import Change

NOW = datetime.datetime.now(datetime.UTC)
TEXT = """version = 1
[federation]
id = "onco-eu"
host_names = ["gateway.onco.example", "localhost", "127.0.0.1"]
operator_names = ["operator", "night"]
"""


def day(number: float) -> datetime.datetime:
    """So many days after now."""
    return NOW + datetime.timedelta(days=number)


@dataclass
class Federation:
    """A coordinator's folder and its sites' folders, under one folder."""

    root: Path
    pinned: Governance
    sites: Path

    @property
    def folder(self) -> Path:
        """The coordinator's."""
        return self.root / "onco-eu"

    @property
    def members(self) -> list[Path]:
        """The governance's key files."""
        return [self.folder / "governance" / f"{number}.key" for number in (1, 2, 3)]

    def copy(self, root: Path) -> "Federation":
        """The same federation elsewhere, to be changed by one test."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Federation(root, self.pinned, root / "sites")

    def enroll(self, name: str) -> str:
        """Make a site's keys; its words."""
        return enroll.enroll(self.keys(name), federation_id="onco-eu", name=name).words

    def keys(self, name: str) -> Path:
        """A site's folder of keys."""
        return self.sites / name

    def request(self, name: str) -> Path:
        """A site's first request."""
        return self.keys(name) / enroll.REQUEST

    def admit(self, name: str, words: str, *, members: int = 2, now: datetime.datetime = NOW) -> Change:
        """Admit a site."""
        chosen = self.members[:members]
        return admit.admit(self.folder, request_file=self.request(name), words=words, governance_files=chosen, now=now)

    def rotate(self, request: Path, *, now: datetime.datetime = NOW) -> Change:
        """Give a site its next certificate."""
        return admit.rotate(self.folder, request_file=request, governance_files=self.members[:2], now=now)

    def revoke(self, name: str) -> Change:
        """Take a site out."""
        return admit.revoke(self.folder, name, governance_files=self.members[1:], now=NOW)

    def join(self, name: str) -> Change:
        """Enrol and admit a site."""
        return self.admit(name, self.enroll(name))

    def unpack(self, change: Change, into: Path) -> Path:
        """Unpack a kit as a site does."""
        with tarfile.open(change.kit) as archive:
            archive.extractall(into, filter="data")
        return into / change.name

    def install(self, kit: Path, name: str, *, words: str | None = None, now: datetime.datetime = NOW) -> Kit:
        """Install a kit."""
        heard = self.pinned.words if words is None else words
        return install.install(kit, keys=self.keys(name), words=heard, now=now)


def start(root: Path, *, now: datetime.datetime = NOW) -> Federation:
    """Found a federation."""
    root.mkdir(exist_ok=True)
    (root / "federation.toml").write_text(TEXT)
    pinned = founding.provision(root / "federation.toml", folder=root / "onco-eu", now=now)
    return Federation(root, pinned, root / "sites")


def seal(files: Mapping[str, bytes], keys: Sequence[Ed25519PrivateKey], *, pinned: Governance) -> dict[str, bytes]:
    """A kit with checksums that these governance keys signed."""
    return kit.close(files, pinned.sign(kit.sums(files), keys, purpose=kit.PURPOSE), pinned=pinned)


def listener(certificate: Path, key: Path, *, trusted: Path, crl: Path | None = None) -> ssl.SSLContext:
    """A server's side: TLS 1.3, client certificates of one issuer only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(trusted)
    if crl:
        context.load_verify_locations(crl)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def caller(certificate: Path, key: Path, *, trusted: Path) -> ssl.SSLContext:
    """A client's side: TLS 1.3, host name checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(trusted)
    context.load_cert_chain(certificate, key)
    return context


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, *, host: str = "localhost") -> tuple[str, bytes, bytes]:
    """A TLS handshake and one byte each way; protocol, the client's and the server's certificate, or SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=host)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (near, far):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    far.write(b"x")
    if near.read(1) != b"x":
        raise AssertionError("nothing came")
    return str(far.version()), far.getpeercert(binary_form=True), near.getpeercert(binary_form=True)
