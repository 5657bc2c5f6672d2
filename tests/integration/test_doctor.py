"""Both doctors against a running SuperLink with the gateway before it, all from one provisioned federation."""

import base64
import datetime
import functools
import os
import shutil
import signal
import socket
import ssl
import sys
import threading
import time
from contextlib import ExitStack

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, DeactivateNodeRequest

from client.courier import tunnel as client_link
from client.doctor import host
from common.doctor import checks, probe
from common.errors import AuthError, TransportError
from common.run.config import LinkConfig
from common.trust import certs, roster
from server.doctor import gateway as gateway_doctor
from server.doctor.examine import Machine, examine
from server.gateway import settings
from server.run import link
from simulations.engines import deployment, loopback_keys
from simulations.engines.deployment import HOST
from tests.connect_proxy import ConnectProxy
from tests.samples import federations, machines
from tests.unit.server.doctor.test_doctor import GATEWAY


class World:
    """A federation, its gateway's file and the processes."""

    def __init__(self, root) -> None:
        self.federation = federations.start(root / "federation")
        for name in ("alder", "birch"):
            self.federation.join(name)
            self.federation.install(self.federation.folder / "kits" / name, name)
        self.ports = {name: deployment.free_port() for name in ("superlink", "fleet", "control")}
        self.keys, self.logs, self.processes = root / "superlink", root / "logs", {}
        for folder in (self.keys, self.logs):
            folder.mkdir(mode=0o700)
        loopback_keys.write_certificates(self.keys)
        self.gateway_file = root / "GATEWAY.toml"
        text = GATEWAY.format(folder=self.federation.folder).replace("[log]", "check_every_s = 0.1\n[log]")
        text = text.replace(f"{self.federation.folder}/ca/root.pem", f"{self.keys}/ca.pem")
        for number, door in enumerate(("superlink", "fleet", "control"), start=1):
            text = text.replace(f'"127.0.0.1:{number}"', f'"{self.address(door)}"')
        self.gateway_file.write_text(text)

    def address(self, door: str) -> str:
        return f"{HOST}:{self.ports[door]}"

    def start(self, name: str) -> None:
        commands = {
            "superlink": deployment.superlink_command(
                self.address("superlink"),
                ca_file=self.keys / "ca.pem",
                certificate=self.keys / "server.pem",
                database=self.keys / "superlink.db",
            ),
            "gateway": [sys.executable, "-m", "server.cli.app", "gateway", str(self.gateway_file)],
        }
        env = deployment.environment(flwr_home=self.keys / "flower", num_threads=1)
        self.processes[name] = deployment.start(name, commands[name], logs=self.logs, env=env)
        doors = {"superlink": ("superlink",), "gateway": ("fleet", "control")}[name]
        end = time.monotonic() + 300
        while not all(is_open(self.ports[door]) for door in doors):
            self.processes[name].check()
            assert time.monotonic() < end
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        popen = self.processes.pop(name).popen
        os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()

    def ask(self, keys=None, *, skew_s: float = 0.0):
        """The site's dry handshake."""
        folder = keys or self.federation.keys("alder")
        return host.shake_hands(self.address("fleet"), folder, clock=lambda: time.time() + skew_s)

    def standing(self, name: str = "alder"):
        """What a site's doctor says of its registration."""
        folder = self.federation.keys(name)
        path = roster.STANDING_PATH
        return host.registration(host.shake_hands(self.address("fleet"), folder, clock=time.time, path=path))

    def connect(self, name: str) -> int:
        """What a site's courier does as it starts and as it stops; the node's id."""
        keys = self.federation.keys(name)
        files = {"ca_file": keys / "ca.pem", "certificate_file": keys / "site.pem", "key_file": keys / "tls.key"}
        node, now = certs.load_key(keys / "node.key"), datetime.datetime.now(datetime.UTC).isoformat()
        pem, signature = certs.public_pem(node).encode(), node.sign(now.encode(), ec.ECDSA(hashes.SHA256()))
        headers = {"flwr-timestamp": now, "content-type": "application/protobuf"} | {
            f"flwr-{name}": base64.b64encode(value).decode()
            for name, value in {"public-key": pem, "signature": signature}.items()
        }
        base_url, context = f"https://{self.address('fleet')}", client_link.outward_context(**files)
        with httpx.Client(base_url=base_url, verify=context, trust_env=False, headers=headers) as client:
            request = ActivateNodeRequest(public_key=pem, heartbeat_interval=30.0)
            answer = client.post("/v1/fleet/activate-node", content=request.SerializeToString()).raise_for_status()
            node_id = ActivateNodeResponse.FromString(answer.content).node_id
            request = DeactivateNodeRequest(node_id=node_id)
            client.post("/v1/fleet/deactivate-node", content=request.SerializeToString()).raise_for_status()
        return node_id

    def examine(self, **patient):
        return {r.name: r for r in examine(Machine(self.federation.folder, self.gateway_file, **patient))}


def is_open(port: int) -> bool:
    with socket.socket() as probing:
        return probing.connect_ex((HOST, port)) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("world"))
    with ExitStack() as stack:
        stack.callback(lambda: deployment.stop(list(made.processes.values())))
        for name in ("superlink", "gateway"):
            made.start(name)
        assert made.standing().status == "failed"  # nothing is registered yet
        made.node_ids = {name: made.connect(name) for name in ("alder", "birch")}
        yield made


def test_a_healthy_site_gets_through_to_the_superlink_and_leaves_no_trace(world, tmp_path, tiny_base, engine):
    site = machines.make(tmp_path / "site", world.federation, base=tiny_base, base_sha256=engine.base_sha256)
    found = {result.name: result for result in site.examine(gateway=world.address("fleet")).results}
    assert (found["gateway"].status, found["clock"].status) == ("ok", "ok")
    assert found["gateway"].found.startswith("TLSv1.3")
    assert "the SuperLink behind it answers (401" in found["gateway"].found
    assert all(result.status != "failed" for result in found.values())
    (key, certificate), root = operator(world), world.federation.folder / "ca" / "root.pem"
    nodes = listed(world, key, certificate, root)
    assert nodes == []  # nobody was let in
    assert found["registration"].status == "ok"
    for change, status in (lambda data: data, "ok"), (lambda data: data + b" ", "warning"):
        (tmp_path / "roster.json").write_bytes(change((world.federation.folder / "roster.json").read_bytes()))
        keys, agents = world.federation.keys("alder"), str(tmp_path)
        hands = functools.partial(host.shake_hands, world.address("fleet"), keys, clock=time.time)
        asked = host.ask_roster(hands, agents=agents)
        assert host.newest_roster(asked).status == status


def operator(world):
    folder = world.federation.folder / "operators"
    return folder / "operator.key", folder / "operator.pem"


def listed(world, key, certificate, root) -> list[int]:
    identity = link.Identity(certificate, key)
    with link.connect(world.address("control"), ca_file=root, identity=identity) as connected:
        return connected.online_node_ids()


def test_a_healthy_coordinator_passes(world):
    found = world.examine()
    told = {name: result.found for name, result in found.items() if result.status != "ok"}
    assert told.keys() == {"governance"}  # the members' keys are still there
    assert "no answer without a certificate" in found["listener for sites"].found
    assert "the SuperLink behind it answers" in found["listener for operators"].found
    assert "loopback only" in found["SuperLink"].found
    assert "not connected now: alder, birch" in found["registrations"].found
    assert len(found) == 19


def test_without_the_node_key_the_certificate_is_still_tried(world, tmp_path):
    for name in ("ca.pem", "site.pem", "tls.key"):
        shutil.copy2(world.federation.keys("alder") / name, tmp_path / name)
    found = host.gateway(world.ask(tmp_path))
    assert (found.status, "SuperLink is not reached" in found.found) == ("ok", True)


@pytest.mark.parametrize(("skew_s", "ahead"), [(120.0, "ahead of"), (-120.0, "behind")])
def test_a_clock_that_is_wrong(world, skew_s, ahead):
    found = checks.clock(world.ask(skew_s=skew_s).skew_s)
    assert (found.status, ahead in found.found, "timedatectl" in found.remedy) == ("failed", True, True)


def test_another_sites_node_key(world, tmp_path):
    shutil.copytree(world.federation.keys("alder"), tmp_path, dirs_exist_ok=True)
    tmp_path.chmod(0o700)
    shutil.copy2(world.federation.keys("birch") / "node.key", tmp_path / "node.key")
    found = host.gateway(world.ask(tmp_path))
    assert (found.status, "node.key is not that" in found.found) == ("failed", True)


def test_a_site_of_another_federation(world, tmp_path):
    other = federations.start(tmp_path / "other")
    other.join("alder")
    other.install(other.folder / "kits" / "alder", "alder")
    found = host.gateway(world.ask(other.keys("alder")))
    assert (found.status, "its certificate is not accepted" in found.found) == ("failed", True)
    shutil.copy2(world.federation.folder / "ca" / "root.pem", other.keys("alder") / "ca.pem")
    assert host.gateway(world.ask(other.keys("alder"))).status == "failed"


def test_a_gateway_that_is_not_there(world):
    nobody = f"{HOST}:{deployment.free_port()}"
    found = host.gateway(host.shake_hands(nobody, world.federation.keys("alder"), clock=time.time))
    assert (found.status, "no connection" in found.found) == ("failed", True)
    assert host.gateway(host.shake_hands("gateway", world.federation.keys("alder"), clock=time.time)).status == "failed"
    assert host.gateway(None).status == "skipped"


def test_the_operators_door_is_not_the_sites_door(world):
    address = world.address("control")
    found = host.gateway(host.shake_hands(address, world.federation.keys("alder"), clock=time.time))
    assert found.status == "failed"


def test_an_operator_who_is_not_in_the_roster(world, tmp_path):
    other = federations.start(tmp_path / "other").folder
    files = (other / "operators" / "operator.pem", other / "operators" / "operator.key")
    assert world.examine(operator=files)["listener for operators"].status == "failed"


def test_a_listener_that_asks_for_no_certificate(world, tmp_path):
    """Control: the check says failed where the answer of a server without client certificates comes."""
    servers = world.federation.folder / "servers"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(servers / "gateway.pem", servers / "gateway.key")
    config = settings.load(world.gateway_file)
    with socket.create_server((HOST, 0)) as listening:
        answering = threading.Thread(target=answer, args=(listening, context, 2), daemon=True)
        answering.start()
        address = f"{HOST}:{listening.getsockname()[1]}"
        open_door = config.model_copy(update={"fleet": config.fleet.model_copy(update={"listen": address})})
        found = gateway_doctor.fleet_listener(open_door, ca_file=world.federation.folder / "ca" / "root.pem")
        answering.join(60)
    assert (found.status, "without a certificate" in found.found) == ("failed", True)


def answer(listening, context, count: int) -> None:
    for _ in range(count):
        connection, _ = listening.accept()
        with context.wrap_socket(connection, server_side=True) as secure:
            if secure.recv(4096):
                secure.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


def test_a_proxy_that_speaks_no_tls_and_one_that_says_nothing(world):
    with socket.create_server((HOST, 0)) as listening:
        address = f"{HOST}:{listening.getsockname()[1]}"

        def hang_up() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        for act in (hang_up, lambda: listening.accept()[0].close()):
            answering = threading.Thread(target=act, daemon=True)
            answering.start()
            with pytest.raises((AuthError, TransportError)):
                probe.ask(address, context=ssl.create_default_context(), path="/", headers={})
            answering.join(60)


def test_a_proxy_on_the_way_is_passed_and_one_that_wants_a_password_is_told_with_the_remedy(world):
    def ask(between: ConnectProxy):
        settings, keys = LinkConfig(proxy=f"http://127.0.0.1:{between.port}"), world.federation.keys("alder")
        outcome = host.shake_hands(world.address("fleet"), keys, clock=time.time, settings=settings)
        return host.gateway(outcome, proxy=settings.proxy)

    with ConnectProxy() as between:
        found = ask(between)
    assert found.status == "ok"
    assert f"this site's certificate through the proxy http://127.0.0.1:{between.port}" in found.found
    with ConnectProxy(password="a:b") as between:
        refused = ask(between)
    assert (refused.status, "link.proxy_auth_file" in refused.remedy) == ("failed", True)


def until(look, status: str):
    """The gateway reads its roster anew every so often."""
    end = time.monotonic() + 60
    while (result := look()).status != status and time.monotonic() < end:
        time.sleep(0.1)
    return result


def test_a_revoked_site(world):
    world.federation.join("elm")
    elm = world.federation.keys("elm")
    world.federation.install(world.federation.folder / "kits" / "elm", "elm")
    assert until(lambda: host.gateway(world.ask(elm)), "ok").status == "ok"
    world.federation.revoke("elm")
    found = until(lambda: host.gateway(world.ask(elm)), "failed")
    assert (found.status, "revoked" in found.found) == ("failed", True)


def test_a_gateway_that_cannot_read_its_roster(world):
    path = world.federation.folder / "roster.json"
    path.rename(path.with_suffix(".away"))
    try:
        found = until(lambda: host.gateway(world.ask()), "failed")
    finally:
        path.with_suffix(".away").rename(path)
        until(lambda: host.gateway(world.ask()), "ok")
    assert (found.status, "lets nobody in" in found.found) == ("failed", True)


def test_a_superlink_that_is_away(world):
    world.kill("superlink")
    try:
        found, own = host.gateway(world.ask()), world.examine()
    finally:
        world.start("superlink")
    assert (found.status, "SuperLink behind it does not answer" in found.found) == ("failed", True)
    assert "502 superlink" in own["listener for operators"].found
    assert "nobody listens" in own["SuperLink"].found
    assert (world.standing().status, own["registrations"].status) == ("ok", "skipped")  # it came back and knows them
    assert {name: world.connect(name) for name in world.node_ids} == world.node_ids


def test_a_superlink_that_lost_its_state_gets_its_sites_back_as_they_connect(world):
    world.kill("superlink")
    for path in world.keys.glob("superlink.db*"):
        path.rename(path.with_name(f"lost-{path.name}"))
    world.start("superlink")
    found, own = world.standing(), world.examine()["registrations"]
    assert (found.status, own.status) == ("failed", "failed")
    assert "systemctl restart silotune-courier" in found.remedy
    assert ("alder, birch" in own.found, "--database" in own.remedy) == (True, True)
    world.node_ids["alder"] = world.connect("alder")
    assert (world.standing().status, world.standing("birch").status) == ("ok", "failed")
    assert (own := world.examine()["registrations"]).status == "warning"
    assert ("birch" in own.found, "alder" in own.found) == (True, False)
    world.node_ids["birch"] = world.connect("birch")
    assert world.examine()["registrations"].status == "ok"
