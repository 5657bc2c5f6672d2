"""A site that fills the SuperLink's memory in pieces, each of a size that passes; its control has no gateway."""

import time

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

from common import envelope
from tests.attacks import pki
from tests.attacks import world as worlds
from tests.attacks.test_bundle import as_olga, echo_run
from tests.attacks.world import World

MIB = 1 << 20


def call(world: World, door: str, path: str, request) -> tuple[int, bytes]:
    with world.client(door, "iris" if door == "fleet" else None) as client:
        answer = client.post(f"/v1/fleet/{path}", content=request.SerializeToString(), headers=world.headers("iris"))
    return answer.status_code, answer.content


def flood(world: World, asked: Metadata, *, door: str) -> int:
    """Answer with 64 MiB in Flower's pieces; the status of their announcement, after which all are sent."""
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


def test_a_member_that_fills_the_memory_in_pieces(world, tmp_path):
    """It was asked for 12 MiB and sends 64, each piece of a size that passes."""
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
    before = worlds.memory_bytes(superlink)
    with world.refuses("reply_size", certificate="iris"):
        assert flood(world, asked[0].metadata, door="fleet") == 413
    assert worlds.memory_bytes(superlink) - before < 32 * MIB
    assert flood(world, asked[0].metadata, door="superlink") == 200  # control: no gateway
    assert worlds.memory_bytes(superlink, "VmHWM") - before > 60 * MIB
