"""A running SuperLink with the gateway before it, and callers with and without the right keys."""

import base64
import datetime
import hashlib
import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, RegisterNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node

from server.run import link
from simulations.engines import deployment, loopback_keys
from simulations.engines.deployment import HOST, Process
from tests.attacks import pki
from tests.attacks.pki import Pki

SITES = ("alder", "birch", "elm", "fir", "gorse", "holly", "iris")
HEARTBEAT = "/v1/fleet/send-node-heartbeat"
LIST_NODES = "/v1/control/list-nodes"
PROTOBUF = "application/protobuf"
ECHO_BUNDLE = link.build_bundle(server_app="gateway_apps:app")
LIMITS = {"requests_per_s": 1, "burst": 100, "connections": 16}
SETTINGS = """
[superlink]
address = "{superlink}"
ca_file = "{keys}/ca.pem"
[fleet]
listen = "127.0.0.1:{fleet}"
certificate_file = "{keys}/gateway.pem"
key_file = "{keys}/gateway.key"
ca_file = "{keys}/sites-ca.pem"
[control]
listen = "127.0.0.1:{control}"
certificate_file = "{keys}/gateway.pem"
key_file = "{keys}/gateway.key"
ca_file = "{keys}/operators-ca.pem"
bundles = {bundles}
[members]
roster_file = "{keys}/roster.json"
governance_file = "{keys}/governance.json"
watermark_file = "{keys}/watermark.json"
revoked_file = "{keys}/revoked.txt"
check_every_s = 0.5
[limits]
requests_per_s = {requests_per_s}
burst = {burst}
connections = {connections}
header_timeout_s = 3
body_timeout_s = 1
[log]
file = "{keys}/refusals.jsonl"
"""


class World:
    """Ports, keys, processes and the log of refusals."""

    def __init__(self, made: Pki, logs: Path) -> None:
        self.pki, self.keys, self.logs = made, made.folder, logs
        self.ports = {name: deployment.free_port() for name in ("superlink", "fleet", "control", "link")}
        self.node_ids: dict[str, int] = {}
        self.processes: list[Process] = []

    def address(self, door: str) -> str:
        return f"{HOST}:{self.ports[door]}"

    @property
    def gateway_pid(self) -> int:
        return next(process.popen.pid for process in self.processes if process.name == "gateway")

    def context(self, name: str | None = None, *, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        """A caller's TLS context; `name`: whose certificate it shows."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.maximum_version = newest
        context.load_verify_locations(self.keys / "root-ca.pem")
        context.load_verify_locations(self.keys / "ca.pem")  # the SuperLink's own
        if name:
            context.load_cert_chain(self.keys / f"{name}.pem", self.keys / f"{name}.key")
        return context

    def client(self, door: str, name: str | None = None, **options) -> httpx.Client:
        verify = self.context(name, **options)
        return httpx.Client(base_url=f"https://{self.address(door)}", verify=verify, timeout=20, trust_env=False)

    def headers(self, node: str) -> dict[str, str]:
        """What a SuperNode sends with each request."""
        now = datetime.datetime.now(datetime.UTC).isoformat()
        signature = self.pki.nodes[node].sign(now.encode(), ec.ECDSA(hashes.SHA256()))
        key = base64.b64encode(pki.public_pem(self.pki.nodes[node])).decode()
        signed = {"flwr-public-key": key, "flwr-timestamp": now, "flwr-signature": base64.b64encode(signature).decode()}
        return {"content-type": PROTOBUF, **signed}

    def heartbeat(self, node: str = "alder") -> bytes:
        """A request that the SuperLink answers well."""
        return SendNodeHeartbeatRequest(
            node=Node(node_id=self.node_ids[node]), heartbeat_interval=30.0
        ).SerializeToString()

    def beat(self, name: str = "alder", *, node: str = "", door: str = "fleet", **more) -> httpx.Response:
        """A heartbeat by one site's certificate and one site's node key."""
        with self.client(door, name or None) as client:
            headers = {**self.headers(node or name), **more}
            return client.post(HEARTBEAT, content=self.heartbeat(node or name), headers=headers)

    def control(
        self, path: str = LIST_NODES, content: bytes = b"", *, name: str | None = "olga", door: str = "control"
    ):
        with self.client(door, name) as client:
            body = content or ListNodesRequest().SerializeToString()
            return client.post(path, content=body, headers={"content-type": PROTOBUF})

    def raw(self, name: str = "elm", *, door: str = "fleet", context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
        """A TLS connection on which a test writes what it likes."""
        plain = socket.create_connection((HOST, self.ports[door]), timeout=20)
        return (context or self.context(name)).wrap_socket(plain, server_hostname=HOST)

    def refusals(self) -> list[dict]:
        return [json.loads(line) for line in (self.keys / "refusals.jsonl").read_text().splitlines()]

    @contextmanager
    def refuses(self, reason: str, *, door: str = "fleet", certificate: str | None = None) -> Iterator[None]:
        """Inside, a refusal for this reason is logged."""
        before = len(self.refusals())
        yield
        end = time.monotonic() + 5
        while not any(_fits(line, reason, door, certificate) for line in self.refusals()[before:]):
            assert time.monotonic() < end, self.refusals()[before:]
            time.sleep(0.05)

    def start(self, name: str, command: list[str]) -> Process:
        env = deployment.environment(flwr_home=self.keys / "flower", num_threads=1)
        process = deployment.start(name, command, logs=self.logs, env=env)
        self.processes.append(process)
        return process

    def stop_since(self, count: int) -> None:
        """Stop all processes but the first ones, and forget them."""
        deployment.stop(self.processes[count:])
        del self.processes[count:]

    def wait_for(self, condition, *, timeout_s: float = 60.0, poll_s: float = 0.1) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            for process in self.processes:
                process.check()
            assert time.monotonic() < end
            time.sleep(poll_s)

    def is_open(self, door: str) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.ports[door])) == 0

    def register(self, name: str) -> None:
        """Let an operator register a site's node key, through the gateway."""
        request = RegisterNodeRequest(public_key=self.pki.node_key(name), name=name)
        answer = self.control("/v1/control/register-node", request.SerializeToString())
        answer.raise_for_status()
        self.node_ids[name] = RegisterNodeResponse.FromString(answer.content).node_id


def _fits(line: dict, reason: str, door: str, certificate: str | None) -> bool:
    is_right = line["reason"].startswith(reason) and line["listener"] == door
    return is_right and certificate in (None, line["certificate"])


def make_pki(folder: Path) -> Pki:
    """All certificates that the tests use."""
    folder.chmod(0o700)
    loopback_keys.write_certificates(folder)
    made = Pki(folder)
    made.issue("gateway", made.servers, host=HOST)
    for name in (*SITES, "absent"):
        made.issue(name, made.sites)
    made.issue("olga", made.operators)
    made.issue("oscar", made.operators)
    made.issue("stranger", made.stranger)
    made.tls["late"] = made.tls["alder"]
    made.issue("late", made.sites, ended=True)
    made.write_roster(sites=SITES, operators=("olga",))
    (folder / "revoked.txt").write_text("# nobody yet\n")
    return made


@contextmanager
def running(keys: Path, logs: Path, **limits: int) -> Iterator[World]:
    """Start a SuperLink and the gateway, with limits of one certificate; stop both on leaving."""
    world = World(make_pki(keys), logs)
    bundles = hashlib.sha256(ECHO_BUNDLE).hexdigest()
    (keys / "gateway.toml").write_text(
        SETTINGS.format(
            **{name: port for name, port in world.ports.items() if name != "superlink"},
            superlink=world.address("superlink"),
            keys=keys,
            bundles=[bundles],
            **{**LIMITS, **limits},
        )
    )
    with ExitStack() as stack:
        stack.callback(lambda: deployment.stop(world.processes))
        world.start(
            "superlink",
            deployment.superlink_command(
                world.address("superlink"), ca_file=keys / "ca.pem", certificate=keys / "server.pem"
            ),
        )
        world.start("gateway", [sys.executable, "-m", "server.cli.app", "gateway", str(keys / "gateway.toml")])
        world.wait_for(lambda: all(world.is_open(door) for door in ("superlink", "fleet", "control")))
        for name in SITES:
            world.register(name)
        yield world


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    """Memory of a process; `VmHWM` is the most that it ever had."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) << 10


def reset_peak(pid: int) -> None:
    """Let `VmHWM` begin anew; where the process keeps others of its user out, it goes on from the start."""
    with suppress(PermissionError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def fingerprint(world: World, name: str) -> str:
    """Of a caller's TLS key."""
    return pki.fingerprint(world.pki.tls[name])


APPS = Path(__file__).parents[1] / "integration" / "apps"
PATHS = os.pathsep.join([str(APPS), str(Path(__file__).parent / "apps"), os.environ.get("PYTHONPATH", "")])
