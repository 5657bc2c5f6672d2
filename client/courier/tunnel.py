"""The site's tunnel to the gateway: TLS on loopback in, TLS 1.3 with the site's certificate out.

A SuperNode cannot show a client certificate, and with a node key it refuses to speak without TLS. So it is pointed
here, with `--root-certificates STATE/link.pem`, and the gateway sees the site's own certificate. Bundles are checked;
redirects, and compressed or endless answers, are refused (`client/courier/relay.py`); all else passes as it is. The
tunnel's certificate is for 127.0.0.1 only, made at the first start, and its key never leaves this machine.
"""

import asyncio
import datetime
import ipaddress
import logging
import signal
import ssl
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h11
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from client.courier import bundle, relay
from client.courier import proxy as proxying
from client.courier.newest_roster import Messenger
from client.courier.proxy import Proxy
from client.courier.relay import PIECE_BYTES, End
from common import keyfile, storage
from common.doctor import probe
from common.errors import ConfigError, TransportError

HOST: Final = "127.0.0.1"
CERTIFICATE: Final = "link.pem"
KEY: Final = "link.key"
MAX_CONNECTIONS: Final = 32
INSPECTION: Final = "check the address; a proxy on the way must pass TLS to the gateway on unopened"
_LIFETIME: Final = datetime.timedelta(days=3650)
_CONNECT_S: Final = 10.0
_CLOSE_S: Final = 3.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """How the gateway is reached."""

    remote: tuple[str, int]
    context: ssl.SSLContext
    proxy: Proxy | None = None


def run(
    *,
    gateway: str,
    ca_file: Path,
    certificate_file: Path,
    key_file: Path,
    state: Path,
    port: int,
    bundles: Collection[str] = (),
    proxy: Proxy | None = None,
    agent: Path | None = None,
) -> None:
    """Carry bytes until SIGTERM or SIGINT.

    Args:
        gateway: `host:port` of the gateway's listener for sites; the host must be a name in its certificate.
        ca_file: PEM certificate that the gateway's must lead to.
        certificate_file: This site's certificate and its chain, PEM.
        key_file: Its private key, PEM, mode 0600.
        state: Folder of the tunnel's own certificate and key; made if it is not there.
        bundles: SHA-256 of the bundles that the SuperNode may be given; none: this release's own.
        agent: The agent's socket, to which the gateway's newest roster is brought; None: nobody brings it.

    Raises:
        ConfigError: A file or an address cannot be used.
        StorageError: The folder cannot be written.
    """
    try:
        remote = probe.split_address(gateway)
    except ConfigError as error:
        raise ConfigError(f"--gateway {error}") from error
    outward = outward_context(ca_file=ca_file, certificate_file=certificate_file, key_file=key_file)
    inward = inward_context(state)
    allowed = frozenset(bundles) or frozenset({bundle.SHA256})
    way = Way(remote, outward, proxy)
    messenger = Messenger(agent, lambda: _open(way), remote[0]) if agent else None
    asyncio.run(_serve(inward, way, port=port, bundles=allowed, messenger=messenger))


def outward_context(*, ca_file: Path, certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    """Make the context towards the gateway: TLS 1.3, host name checked, with this site's certificate.

    Raises:
        ConfigError: A file cannot be used, or the key is open to others.
    """
    keyfile.read(key_file)  # refuses one that is open to others
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cafile=ca_file)
        context.load_cert_chain(certificate_file, key_file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{ca_file}, {certificate_file}, {key_file}: no CA, certificate and the key that belongs to it"
        ) from error
    return context


def inward_context(state: Path) -> ssl.SSLContext:
    """Make the context towards the SuperNode; its certificate is made when it is not there.

    Raises:
        ConfigError: The key is open to others, or does not belong to the certificate.
        StorageError: The folder cannot be written.
    """
    certificate, key = state / CERTIFICATE, state / KEY
    if not certificate.exists():
        _make_certificate(certificate, key)
    keyfile.read(key)  # refuses one that is open to others
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{certificate}, {key} do not fit together; delete both and restart the SuperNode") from error
    return context


async def _serve(
    inward: ssl.SSLContext, way: Way, *, port: int, bundles: Collection[str], messenger: Messenger | None
) -> None:
    """Accept connections until a signal."""
    free = asyncio.Semaphore(MAX_CONNECTIONS)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):  # the program ends
            async with free:
                await _carry(reader, writer, way, bundles=bundles)

    try:
        server = await asyncio.start_server(
            accept, HOST, port, ssl=inward, limit=PIECE_BYTES, ssl_shutdown_timeout=_CLOSE_S
        )
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot listen there ({error.strerror}); choose another") from error
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    looking = asyncio.create_task(messenger.run()) if messenger else None
    async with server:
        await stopped.wait()
    if looking:
        looking.cancel()


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way, *, bundles: Collection[str]
) -> None:
    """Carry one connection; when either end closes, both do. A gateway that is away looks like a closed connection."""
    try:
        far_reader, far_writer = await _open(way)
    except (OSError, TimeoutError, TransportError) as error:
        _log.warning("no connection to the gateway at %s:%d: %s", *way.remote, _reason(error))
        writer.transport.abort()
        return
    near, far = End(reader, writer, h11.Connection(h11.SERVER)), End(far_reader, far_writer, h11.Connection(h11.CLIENT))
    try:
        await relay.carry(near, far, bundles=bundles)
    except ssl.SSLError as error:  # with TLS 1.3 a refused certificate is reported after the handshake
        _log.warning("TLS ended the connection: %s", _reason(error))
    except h11.ProtocolError:
        _log.warning("a connection ended in the middle, or is not HTTP/1.1")
    except OSError:
        return
    finally:
        for end in (near, far):
            end.writer.close()
        await asyncio.gather(near.writer.wait_closed(), far.writer.wait_closed(), return_exceptions=True)


async def _open(way: Way) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """TLS with the gateway, on a connection of its own or in a proxy's tunnel."""
    where: dict[str, Any] = dict(zip(("host", "port"), way.remote, strict=True))
    if way.proxy:  # which keeps to its own limit of time
        opened = await asyncio.to_thread(proxying.connect, way.proxy, way.remote, timeout_s=_CONNECT_S)
        where = {"sock": opened, "server_hostname": way.remote[0]}
    async with asyncio.timeout(_CONNECT_S):
        return await asyncio.open_connection(**where, ssl=way.context, limit=PIECE_BYTES, ssl_shutdown_timeout=_CLOSE_S)


def _reason(error: OSError | TimeoutError | TransportError) -> str:
    """What to tell about a failed connection."""
    if isinstance(error, TransportError):
        return str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({error.verify_message}); {INSPECTION}"
    if isinstance(error, ssl.SSLError):
        return str(error.reason)
    return error.strerror or "it does not answer"


def _make_certificate(certificate_file: Path, key_file: Path) -> None:
    """Write a key and a certificate for 127.0.0.1 that is its own root."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "silotune link")])
    now = datetime.datetime.now(datetime.UTC)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
    ]
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(minutes=5)).not_valid_after(now + _LIFETIME)
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, critical=is_critical)
    public = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    key_file.unlink(missing_ok=True)
    keyfile.write(key_file, private)
    storage.write_atomic(certificate_file, public)  # last, as it says that both are there
