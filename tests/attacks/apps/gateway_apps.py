"""What a run through the gateway does: a frame of three of Flower's pieces to one node, and what came back."""

import hashlib
import json
import random
import time
from pathlib import Path

from flwr.serverapp import ServerApp

from server.fleet.grid import GridFleet

app = ServerApp()


@app.main()
def main(grid, context) -> None:
    fleet, folder = GridFleet(grid), Path(context.run_config["run-folder"])
    frame = random.Random(0).randbytes(12 << 20)
    node = int((folder / "node").read_text())
    asked = (fleet.send(node, frame, kind="train", ttl_s=60.0, max_reply_bytes=len(frame) + 32),)
    while not (replies := list(fleet.receive(asked))):
        time.sleep(0.1)
    is_right = replies[0].frame == hashlib.sha256(frame).digest() + frame[::-1]
    told = "right" if is_right else replies[0].failure
    (folder / "told.json").write_text(json.dumps(told))
