"""The coordinator's calls to a SuperLink: register a node's key, start a run, ask how it stands.

The bundle that starts a run holds names only: the code that answers is the package installed at each end, so nothing
that a coordinator could send runs at a site.
"""

import hashlib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
from flwr.app.user_config import UserConfig
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StreamLogsRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common import keyfile
from common.errors import ConfigError, TransportError

FINISHED: Final = "finished"
COMPLETED: Final = "completed"
_BUNDLE: Final = """
[project]
name = "silotune"
version = "1.0.0"

[tool.flwr.app]
publisher = "silotune"

[tool.flwr.app.components]
serverapp = "{server_app}"
clientapp = "{client_app}"

[tool.flwr.app.config]
run-folder = ""
base-folder = ""
num-threads = 0
resume = false
operator-key = ""
federation = ""
offer-days = 30.0
audit-folder = ""
roster-folder = ""
i-accept = false
"""


@dataclass(frozen=True)
class RunState:
    """How a run stands at the SuperLink: Flower's status, and for a finished run how it ended."""

    status: str
    sub_status: str
    details: str

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status == FINISHED

    @property
    def is_completed(self) -> bool:
        """Whether it has ended well."""
        return self.is_finished and self.sub_status == COMPLETED


@dataclass(frozen=True)
class Node:
    """A node that a SuperLink knows: its id, its public key, PEM, and whether it is connected now."""

    node_id: int
    public_key: bytes
    is_online: bool


@dataclass(frozen=True)
class Identity:
    """An operator's certificate with its chain, and its private key, both PEM."""

    certificate_file: Path
    key_file: Path


class Link:
    """Calls to one SuperLink; see `connect`."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def register(self, public_key: bytes, *, name: str) -> int:
        """Admit a node by its public key, PEM; returns the node's id."""
        return int(self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def nodes(self) -> list[Node]:
        """The nodes that are registered."""
        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [Node(node.node_id, node.public_key, node.status == "online") for node in nodes]

    def online_node_ids(self) -> list[int]:
        """Tell which registered nodes are connected now, ascending."""
        return sorted(node.node_id for node in self.nodes() if node.is_online)

    def names(self) -> dict[int, str]:
        """The name of each node that was registered under one, by the node's id."""
        return {node.node_id: node.name for node in self._client.ListNodes(ListNodesRequest()).nodes_info if node.name}

    def start_run(self, run_config: UserConfig, *, bundle: bytes) -> int:
        """Submit a run; returns its id.

        Args:
            run_config: Values for the keys of the bundle's `[tool.flwr.app.config]`.
            bundle: See `build_bundle`.

        Raises:
            TransportError: The SuperLink did not take it.
        """
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config)))
        response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise TransportError("the SuperLink did not start the run; its log says why")
        return int(response.run_id)

    def state(self, run_id: int) -> RunState:
        """Tell how a run stands.

        Raises:
            TransportError: SuperLink or gateway did not answer as expected; they may do so when asked again.
        """
        try:
            status = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
        except httpx.HTTPError as error:
            raise TransportError(f"the SuperLink did not tell how the run stands: {type(error).__name__}") from error
        return RunState(status=status.status, sub_status=status.sub_status, details=status.details)

    def log_of(self, run_id: int) -> str:
        """Return what a finished run's server process printed."""
        return "".join(part.log_output for part in self._client.StreamLogs(StreamLogsRequest(run_id=run_id)))


@contextmanager
def connect(address: str, *, ca_file: Path, identity: Identity | None = None) -> Iterator[Link]:
    """Open a TLS connection to the control interface of a SuperLink, or of the gateway before it.

    Args:
        address: `host:port`.
        ca_file: PEM certificate that the other end's own must lead to.
        identity: The operator's certificate and key, for the gateway; a SuperLink asks for none.

    Raises:
        ConfigError: A file cannot be read.
        TransportError: A call failed while the connection was open.
    """
    client = ControlHttpClient(
        f"https://{address}",
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        verify=_context(ca_file, identity),
    )
    try:
        yield Link(client)
    except httpx.HTTPError as error:
        raise TransportError(
            f"the SuperLink at {address} did not answer as expected: {type(error).__name__}"
        ) from error
    finally:
        client.close()


def register_file(public_key: Path, *, name: str, address: str, ca_file: Path, identity: Identity | None = None) -> int:
    """Admit the node whose public key lies in a file; returns the node's id.

    Raises:
        ConfigError: A file cannot be read.
        TransportError: The SuperLink did not take it.
    """
    try:
        key = public_key.read_bytes()
    except OSError as error:
        raise ConfigError(f"{public_key}: cannot read this public key; ask the site for it") from error
    with connect(address, ca_file=ca_file, identity=identity) as link:
        return link.register(key, name=name)


def _context(ca_file: Path, identity: Identity | None) -> ssl.SSLContext:
    """What is trusted, and what is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=ca_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{ca_file}: cannot read the CA certificate; give its path with --ca") from error
    if identity is None:
        return context
    keyfile.read(identity.key_file)  # refuses one that is open to others
    try:
        context.load_cert_chain(identity.certificate_file, identity.key_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{identity.certificate_file}: no certificate, or not that of {identity.key_file}") from error
    return context


def identity_of(certificate: Path | None, key: Path | None) -> Identity | None:
    """The operator's two files, or neither.

    Raises:
        ConfigError: One without the other.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("--certificate and --key go together; give both, or neither")
    return Identity(certificate, key)


def build_bundle(*, server_app: str = "server.run.app:app", client_app: str = "client.courier.app:app") -> bytes:
    """Make the Flower bundle of a run: the names of two installed objects, and no code.

    Example:
        >>> len(build_bundle()) < 2000
        True
    """
    text = _BUNDLE.format(server_app=server_app, client_app=client_app)
    return build_fab_from_files({"pyproject.toml": text.encode()})[0]
