"""What Ray's workers see of a machine's GPUs, in a process of its own, as `ray_run`."""

import json
import os
import sys
from collections.abc import Callable

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from common.frame import envelope
from simulations.engines import flower


def agent_for(site_index: int) -> Callable[[bytes], bytes]:
    """A site that answers with the GPUs that its worker sees."""
    return lambda frame: json.dumps([site_index, os.environ.get("CUDA_VISIBLE_DEVICES")]).encode()


def main(num_workers: int, num_gpus: int) -> None:
    """Ask each of four sites; print what they see."""

    def ask(grid: Grid) -> list[list[object]]:
        content = {envelope.NAME: ArrayRecord({envelope.NAME: Array(*envelope.declare(b"frame"))})}
        nodes = list(grid.get_node_ids())
        requests = [Message(RecordDict(dict(content)), node, "query.train") for node in nodes]
        replies = grid.send_and_receive(requests, timeout=60)
        return [json.loads(envelope.unpack(reply.content)) for reply in replies]

    seen = flower.run(ask, agent_for, num_sites=4, num_workers=num_workers, num_gpus=num_gpus)
    print(json.dumps(dict(sorted(seen))))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
