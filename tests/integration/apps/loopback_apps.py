"""What the test federation runs beside the product's own parts: an agent and a server's side that only pass frames."""

import hashlib
import json
import random
import sys
import time
from pathlib import Path

from client.courier import door

MIB = 1 << 20


def agent(argument: str) -> None:
    """Serve the hash of every frame, and the frame backwards."""
    server = door.serve(
        lambda frame: hashlib.sha256(frame).digest() + frame[::-1],
        socket_path=Path(argument),
        max_message_bytes=16 * MIB,
    )
    door.wait(server)


def exchange(fleet) -> dict:
    """A frame within the agents' limit to the first node, one above it to the second; what came back."""
    first, second = fleet.node_ids()
    started = time.monotonic()
    frame = random.Random(0).randbytes(12 * MIB)
    asked = {fleet.send(first, frame, kind="train", ttl_s=60.0): "train"}
    asked[fleet.send(second, bytes(20 * MIB), kind="evaluate", ttl_s=60.0)] = "evaluate"
    told = {}
    while asked:
        for reply in fleet.receive(tuple(asked)):
            is_right = reply.frame == hashlib.sha256(frame).digest() + frame[::-1]
            told[asked.pop(reply.ticket)] = "right" if is_right else reply.failure
        time.sleep(0.1)
    return {**told, "nodes": [first, second], "seconds": round(time.monotonic() - started, 2)}


if __name__ == "__main__":
    agent(sys.argv[1])
else:
    from flwr.serverapp import ServerApp

    from server.fleet.grid import GridFleet

    app = ServerApp()

    @app.main()
    def main(grid, context) -> None:
        """Write what `exchange` told into the run folder."""
        told = exchange(GridFleet(grid))
        (Path(context.run_config["run-folder"]) / "told.json").write_text(json.dumps(told))
