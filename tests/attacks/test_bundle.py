"""A1 on running processes: what a SuperNode behind a link and the gateway runs, and what it is not even given."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from server import link
from simulations import deployment
from simulations.deployment import HOST
from tests.attacks import world as worlds
from tests.attacks.world import ECHO_BUNDLE, World


@contextmanager
def joined(world: World, folder: Path, name: str, *, bundles: tuple[str, ...]) -> Iterator[None]:
    """A site's link, agent and SuperNode, connected."""
    folder.chmod(0o700)
    before = len(world.processes)
    with ExitStack() as stack:
        stack.callback(lambda: world.stop_since(before))
        join(world, folder, name, bundles=bundles)
        world.wait_for(lambda: "SuperNode ID:" in (world.logs / f"{name}-supernode.log").read_text())
        yield


def join(world: World, folder: Path, name: str, *, bundles: tuple[str, ...]) -> None:
    """Start a site's link, agent and SuperNode."""
    keys, socket_path, state, port = world.keys, folder / "agent.sock", folder / "link", deployment.free_port()
    options = {"gateway": world.address("fleet"), "ca": keys / "root-ca.pem", "state": state}
    options |= {"certificate": keys / f"{name}.pem", "key": keys / f"{name}.key", "port": port}
    given = [item for option, value in options.items() for item in (f"--{option}", str(value))]
    given += [item for bundle in bundles for item in ("--bundle", bundle)]
    world.ports["link"] = port
    world.start(f"{name}-link", [sys.executable, "-m", "client.cli", "link", *given])
    world.start(f"{name}-agent", [sys.executable, str(worlds.APPS / "loopback_apps.py"), str(socket_path)])
    world.wait_for(lambda: world.is_open("link"))
    node = ["--superlink", world.address("link"), "--root-certificates", str(state / "link.pem")]
    node += ["--auth-supernode-private-key", str(keys / f"{name}.node"), "--host", HOST]
    node += ["--port", str(deployment.free_port()), "--node-config", f'agent-socket="{socket_path}"']
    world.start(f"{name}-supernode", ["flower-supernode", *node])
    (folder / "node").write_text(str(world.node_ids[name]))


def echo_run(world: World, folder: Path, connected: link.Link) -> int:
    """Start the run that sends one frame to one node."""
    return connected.start_run({"run-folder": str(folder)}, bundle=ECHO_BUNDLE)


def as_olga(world: World):
    identity = link.Identity(world.keys / "olga.pem", world.keys / "olga.key")
    return link.connect(world.address("control"), ca_file=world.keys / "root-ca.pem", identity=identity)


def test_a_supernode_through_tunnel_and_gateway_answers_a_message(world, tmp_path):
    listed = (hashlib.sha256(ECHO_BUNDLE).hexdigest(),)
    with joined(world, tmp_path, "gorse", bundles=listed), as_olga(world) as connected:
        run_id = echo_run(world, tmp_path, connected)
        world.wait_for((tmp_path / "told.json").exists)
        world.wait_for(lambda: connected.state(run_id).is_finished, poll_s=1.0)  # within the operator's rate
        assert connected.state(run_id).is_completed, connected.log_of(run_id)
    assert (tmp_path / "told.json").read_text() == '"right"'


def test_a01_a_bundle_that_the_coordinator_lists_and_the_site_does_not_is_not_run(world, tmp_path):
    """Its control is the test above: the same bundle, listed at the site."""
    link_log, node_log, told = world.logs / "birch-link.log", world.logs / "birch-supernode.log", tmp_path / "told.json"
    refusal = f"refused: bundle {hashlib.sha256(ECHO_BUNDLE).hexdigest()} is not allowed here"
    with joined(world, tmp_path, "birch", bundles=()), as_olga(world) as connected:
        echo_run(world, tmp_path, connected)
        world.wait_for(lambda: refusal in link_log.read_text())
        world.wait_for(lambda: "Ignoring message" in node_log.read_text())  # the SuperNode's own word: nothing was run
    assert not told.exists() or told.read_text() != '"right"'
