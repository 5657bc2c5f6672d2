"""The gateway's own file and files, its two listeners, and the SuperLink behind it."""

import datetime
import ipaddress
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography import x509

from common import hosts
from common.doctor import checks, probe
from common.doctor.doctor import Result, check, count, failed, ok, skipped, warning
from common.doctor.probe import Answer
from common.errors import AuthError, SilotuneError, TransportError
from common.trust import certs, governance, roster
from common.trust.roster import Roster
from server.gateway import members, settings, tls
from server.gateway.settings import GatewayConfig
from server.run import link
from server.run.link import Identity, Node

LIST_NODES: Final = "/v1/control/list-nodes"
GET_RUN: Final = "/v1/fleet/get-run"
PROTOBUF: Final = {"content-type": "application/protobuf"}
NET: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LOG_BYTES: Final = 64 << 20
_REISSUE: Final = "run: silotune-server reissue --federation DIR; copy servers/ here, and restart the gateway"
_REGISTER: Final = (
    "start flower-superlink with --database FILE, as the unit of provision does; the gateway registers a site when its "
    "courier connects: the site restarts it, or wait half a minute. By hand: silotune-server register nodes/NAME.pub"
)
_LISTEN: Final = "0A"
_START: Final = "start it: silotune-server gateway GATEWAY.toml"
_EXPOSED: Final = "whoever reaches it can start runs: flower-superlink --host 127.0.0.1, and a gateway before it"


@check("gateway's file", remedy="correct the file; docs/gateway.md shows it whole")
def file(path: Path) -> Result:
    """Check GATEWAY.toml, and that its two CAs are apart."""
    config = settings.load(path)
    tls.check_apart(Path(config.fleet.ca_file), Path(config.control.ca_file))
    return ok(f"{path}: sites on {config.fleet.listen}, operators on {config.control.listen}")


@check("gateway's keys", remedy="copy servers/gateway.pem and gateway.key of the federation's folder here again")
def certificates(config: GatewayConfig) -> Result:
    """Load what both listeners show and trust; keys must be of mode 0600 and belong to their certificates."""
    for ends in (config.fleet, config.control):
        files = {"certificate_file": Path(ends.certificate_file), "key_file": Path(ends.key_file)}
        tls.server_context(**files, ca_file=Path(ends.ca_file), on_failure=lambda _: None)
    tls.upstream_context(Path(config.superlink.ca_file))
    return ok(f"{', '.join(sorted(_shown(config)))} with their keys, and all three CAs")


@check("gateway's roster", remedy="copy roster.json and revoked.txt of the federation's folder to the gateway")
def known_members(config: GatewayConfig, newest: Roster | None) -> Result:
    """Check that governance signed the roster, that the gateway has seen no newer one, and nor has the federation.

    Args:
        newest: The federation's; None: unknown.
    """
    files, watermark = config.members, Path(config.members.watermark_file)
    pinned = governance.load(Path(files.governance_file))
    epoch_min = roster.seen_epoch(watermark) if watermark.exists() else 1
    current = roster.load(Path(files.roster_file), governance=pinned, epoch_min=epoch_min)
    revoked = members.read_revoked(Path(files.revoked_file))
    if newest is not None and current.to_bytes() != newest.to_bytes():
        return failed(f"the gateway has epoch {current.epoch}, the federation {newest.epoch}")
    return ok(
        f"epoch {current.epoch} of {current.federation_id}, {count(len(current.sites), 'site')}, {len(revoked)} revoked"
    )


@check("gateway's end", remedy=_REISSUE)
def end(config: GatewayConfig, *, now: datetime.datetime) -> Result:
    """Check how long the listeners' certificates are valid."""
    ends = {Path(file).name: _leaf(file).not_valid_after_utc for file in sorted(_shown(config))}
    return checks.expiry(ends, now=now, remedy=_REISSUE)


@check("gateway's log", remedy="free space, or set log.file to a place on another disk")
def log_disk(config: GatewayConfig) -> Result:
    """Check that refusals can be written."""
    return checks.disk(Path(config.log.file).parent, need_bytes=LOG_BYTES, what="the log of refusals")


@check("listener for sites", remedy=_START)
def fleet_listener(config: GatewayConfig, *, ca_file: Path) -> Result:
    """Check that it listens with TLS 1.3 and its certificate, and that it answers nobody who shows none."""
    address, host = _reachable(config.fleet.listen), _host(config.fleet.certificate_file)
    context = _context(ca_file)
    version = probe.shake_hands(address, context=context, host=host)
    try:
        probe.ask(address, context=context, path=GET_RUN, headers=PROTOBUF, host=host)
    except (AuthError, TransportError):
        return ok(f"{address}: {version}, and no answer without a certificate")
    return failed(f"{address}: answers a caller without a certificate", "another program listens there; stop it")


@check("listener for operators", remedy=_START)
def control_listener(outcome: Answer | SilotuneError | None) -> Result:
    """Judge how the listener answered an operator who asked for the list of nodes.

    Raises:
        SilotuneError: There was no answer.
    """
    if outcome is None:
        return skipped("not asked", "give --certificate and --key of an operator, or --federation DIR")
    if isinstance(outcome, SilotuneError):
        raise outcome
    start = f"{outcome.tls} with the operator's certificate"
    if outcome.status == 200:
        return ok(f"{start}; the SuperLink behind it answers")
    remedy = {
        "superlink": "start the SuperLink at superlink.address",
        "members_unreadable": "the gateway's stderr says which file it cannot read",
        "not_in_roster": "use the certificate of an operator in the roster, or copy the newest roster to the gateway",
        "expired": "run: silotune-server reissue --federation DIR",
    }.get(outcome.reason, "is this our gateway? Compare control.listen with what runs there")
    return failed(f"{start}; then {outcome.status} {outcome.reason}".rstrip(), remedy)


def ask_control(
    config: GatewayConfig, operator: tuple[Path, Path] | None, *, ca_file: Path, clock: Callable[[], float]
) -> Answer | SilotuneError | None:
    """Ask for the list of nodes as an operator.

    Args:
        operator: Certificate and key; None: nobody is asked.
        ca_file: What the gateway's certificate must lead to.
        clock: Unix seconds.

    Returns:
        The answer, or why there is none; None where nobody was asked.
    """
    if operator is None:
        return None
    try:
        context = _context(ca_file, operator)
        host = _host(config.control.certificate_file)
        address = _reachable(config.control.listen)
        return probe.ask(address, context=context, path=LIST_NODES, headers=PROTOBUF, host=host, clock=clock)
    except SilotuneError as error:
        return error


def ask_nodes(
    config: GatewayConfig, operator: tuple[Path, Path] | None, *, ca_file: Path
) -> list[Node] | SilotuneError | None:
    """The nodes that the SuperLink knows, why they are not known, or None where nobody was asked; see `ask_control`."""
    if operator is None:
        return None
    try:
        with link.connect(
            _reachable(config.control.listen), ca_file=ca_file, identity=Identity(*operator)
        ) as connected:
            return connected.nodes()
    except SilotuneError as error:
        return error


@check("registrations", remedy="see the check of the listener for operators")
def registrations(listed: Roster | None, nodes: list[Node] | SilotuneError | None) -> Result:
    """Compare the roster with the nodes that the SuperLink knows; one that lost its state knows none.

    Args:
        listed: The federation's roster; None: unknown.

    Raises:
        SilotuneError: The nodes could not be asked for.
    """
    if listed is None or nodes is None:
        return skipped("not asked", "give --federation DIR, whose first operator asks, or --certificate and --key")
    if isinstance(nodes, SilotuneError):
        raise nodes
    known = {node.public_key: node.is_online for node in nodes}
    status = {site.name: known.get(site.node_key.encode("ascii")) for site in listed.sites}
    absent = [name for name, is_online in status.items() if is_online is None]
    if absent:
        lost = f"the SuperLink does not know {', '.join(absent)}: it lost its state, or they never connected"
        return failed(lost, _REGISTER) if len(absent) == len(status) else warning(lost, _REGISTER)
    away = [name for name, is_online in status.items() if not is_online]
    known_sites = f"the SuperLink knows {count(len(status), 'site')} of the roster"
    return ok(f"{known_sites}; not connected now: {', '.join(away)}" if away else f"{known_sites}, all connected")


@check("SuperLink", remedy=_EXPOSED)
def superlink(address: str, *, listening: Callable[[int], set[str]]) -> Result:
    """Check that the SuperLink listens on loopback and nowhere else.

    Args:
        address: Its address, `host:port`; empty: unknown.
        listening: Gives the addresses on which somebody listens on a port of this machine.
    """
    if not address:
        return skipped("no SuperLink is known", "give --gateway or --superlink")
    host, port = probe.split_address(address)
    if not hosts.is_loopback(host):
        return warning(f"{address} is not an address of this machine alone")
    addresses = listening(port)
    if not addresses:
        return failed(f"nobody listens on {address}", "start flower-superlink; docs/gateway.md shows how")
    exposed = sorted(each for each in addresses if not hosts.is_loopback(each))
    return warning(f"it listens on {', '.join(exposed)}, port {port}") if exposed else ok(f"{address}, loopback only")


def listening_on(port: int) -> set[str]:
    """The addresses of this machine on which somebody listens on a port, as the kernel lists them."""
    return {address for path in NET if path.exists() for address in listeners(path.read_text(), port)}


def listeners(table: str, port: int) -> set[str]:
    """The addresses in a table of the kernel's, such as /proc/net/tcp, on which somebody listens on a port.

    Source: Linux, proc_pid_net(5): addresses are hexadecimal, in words of the machine's byte order; state 0A listens.

    Example:
        >>> listeners("  sl  local_address rem_address   st\\n   0: 0100007F:1F40 00000000:0000 0A", 8000)
        {'127.0.0.1'}
    """
    rows = (line.split() for line in table.splitlines()[1:])
    ends = (row[1].split(":") for row in rows if row[3] == _LISTEN)
    listening = set()
    for host in [host for host, number in ends if int(number, 16) == port]:
        words = (bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8))
        listening.add(str(ipaddress.ip_address(b"".join(words))))
    return listening


def _shown(config: GatewayConfig) -> set[str]:
    """The files of the certificates that the listeners show."""
    return {config.fleet.certificate_file, config.control.certificate_file}


def _reachable(listen: str) -> str:
    """Where a listener of this machine is reached; one on all addresses, on loopback."""
    host, port = settings.split_address(listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not listened on
    return f"{hosts.in_url(host)}:{port}"


def _host(certificate_file: str) -> str:
    """The first name that a certificate is for."""
    return certs.first_name(_leaf(certificate_file))


def _leaf(certificate_file: str) -> x509.Certificate:
    """The certificate itself, without its issuers."""
    return certs.parse_chain(governance.read(Path(certificate_file)), name=certificate_file)[0]


def _context(ca_file: Path, operator: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """TLS 1.3 towards a listener, with an operator's certificate or without any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    certificate, key = operator or (None, None)
    tls.load_files(context, ca_file=ca_file, certificate_file=certificate, key_file=key)
    return context
