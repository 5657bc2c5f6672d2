"""Running processes behind the gateway: what a SuperNode is given to run, and what a member leaves at the SuperLink."""

import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from common.frame import envelope
from server.run import link
from simulations.engines import deployment
from simulations.engines.deployment import HOST
from tests.attacks import pki
from tests.attacks import world as worlds
from tests.attacks.world import ECHO_BUNDLE, World

MIB = 1 << 20


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
    world.start(f"{name}-link", [sys.executable, "-m", "client.cli.app", "link", *given])
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


def call(world: World, door: str, path: str, request) -> tuple[int, bytes]:
    with world.client(door, "iris" if door == "fleet" else None) as client:
        answer = client.post(f"/v1/fleet/{path}", content=request.SerializeToString(), headers=world.headers("iris"))
    return answer.status_code, answer.content


def flood(world: World, asked: Metadata, *, door: str) -> int:
    """Answer with 64 MiB in pieces; the status of their announcement, after which all are sent."""
    node = Node(node_id=world.node_ids["iris"])
    frame = b"".join(number.to_bytes(2, "big") * (MIB // 2) for number in range(64))
    content = RecordDict({envelope.NAME: ArrayRecord({envelope.NAME: Array(*envelope.declare(frame))})})
    now, same = time.time(), {name: getattr(asked, name) for name in ("run_id", "message_type", "group_id")}
    told = Metadata(
        message_id="", src_node_id=node.node_id, dst_node_id=asked.src_node_id, reply_to_message_id=asked.message_id,
        created_at=now, ttl=asked.created_at + asked.ttl - now, **same, src_task_id=0, dst_task_id=asked.src_task_id,
    )  # fmt: skip
    told.delivered_at = ""
    message = Message.__new__(Message)  # as a SuperNode makes it, without the process-wide identity that it has
    message.__dict__.update({"_metadata": told, "_content": content, "_error": None})
    told.__dict__["_message_id"] = message.object_id
    objects, tree = get_all_nested_objects(message), get_object_tree(message)
    announced = message_to_proto(remove_content_from_message(message))
    status, body = call(
        world,
        door,
        "push-messages",
        PushMessagesRequest(
            node=node, messages_list=[announced], message_object_trees=[tree], clientapp_runtime_list=[1.0]
        ),
    )
    session = PushMessagesResponse.FromString(body).session_id if status == 200 else "none"
    for object_id, piece in objects.items():
        pushed = PushObjectRequest(
            node=node, run_id=asked.run_id, object_id=object_id, object_content=piece.deflate(), session_id=session
        )
        call(world, door, "push-object", pushed)
    return status


def test_a_member_that_fills_the_memory_in_pieces(world, tmp_path, monkeypatch):
    """It was asked for 12 MiB and sends 64, each piece of a size that passes.

    So many pieces are not announced. Fewer and larger ones would be, and are counted as they come: see
    tests/unit/server/gateway/test_replies.py.
    """
    superlink = world.processes[0].popen.pid
    (tmp_path / "node").write_text(str(world.node_ids["iris"]))
    key = pki.public_pem(world.pki.nodes["iris"])
    assert call(world, "fleet", "activate-node", ActivateNodeRequest(public_key=key, heartbeat_interval=600))[0] == 200
    pull, asked = PullMessagesRequest(node=Node(node_id=world.node_ids["iris"])), []

    def is_asked() -> bool:
        asked.extend(PullMessagesResponse.FromString(call(world, "fleet", "pull-messages", pull)[1]).messages_list)
        return bool(asked)

    with as_olga(world) as connected:
        echo_run(world, tmp_path, connected)
    world.wait_for(is_asked, poll_s=1.0)
    seen = []
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 3 * MIB)
    for _ in range(2):  # the first time the SuperLink's buffers grow, for good
        with world.refuses("reply_size", certificate="iris"):
            assert flood(world, asked[0].metadata, door="fleet") == 413
        seen.append(worlds.memory_bytes(superlink))
    assert seen[1] - seen[0] < 16 * MIB
    assert flood(world, asked[0].metadata, door="superlink") == 200  # control: no gateway
    assert worlds.memory_bytes(superlink) - seen[1] > 48 * MIB
