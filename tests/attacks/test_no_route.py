"""A24 and the rest of the agent's walls, on a real agent process: it needs no network, and leaves no core dump."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from client.agent import process as serve
from client.courier import line
from client.policy import file
from common.adapter import adapter
from common.errors import ConfigError, PolicyRefusedError, TransportError
from common.frame import wire
from common.frame.records import RoundPlan, to_head
from common.frame.wire import Frame
from common.run import config
from common.run.manifest import RunManifest, sign
from common.trust import identity
from tests import tiny
from tests.samples import vault

UNSHARE = ("unshare", "--map-root-user", "--net")
START_S = 120.0


def can_unshare() -> bool:
    """Whether this user may make a network namespace."""
    return (
        shutil.which("unshare") is not None and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    )


needs_namespace = pytest.mark.skipif(not can_unshare(), reason="this user may not make a network namespace")


@pytest.fixture
def folder():
    """A short path: a socket's may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="silotune-") as path:
        yield Path(path)


@pytest.fixture
def node_file(folder, tiny_base, shared_engine):
    """A site with a policy that needs nobody's approval."""
    rows = [
        {"instruction": row.messages[0].content, "output": row.messages[1].content, "patient_id": row.unit}
        for row in tiny.rows(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    identity.create(folder / "site.pem")
    text = vault.policy_text(shared_engine.base_sha256, approval='"none"', path=f'"{folder / "rows.jsonl"}"')
    (folder / "policy.toml").write_text(text)
    file.sign(folder / "policy.toml", vault.ADMIN)
    path = folder / "node.toml"
    path.write_text(
        f'[site]\nname = "north"\n[data]\npath = "{folder / "rows.jsonl"}"\n[model]\nbase = "{tiny_base}"\n'
        f'[hardware]\ndevice = "cpu"\nnum_threads = 1\n[agent]\nsocket = "{folder / "agent.sock"}"\n'
        f'log_folder = "{folder / "log"}"\npolicy = "{folder / "policy.toml"}"\n'
        f'policy_signer = "{identity.public_hex(vault.ADMIN)}"\nidentity_key = "{folder / "site.pem"}"\n'
    )
    return path


@pytest.fixture
def agent(folder, node_file):
    """The agent's process in a network namespace of its own, which has no route out."""
    command = [*UNSHARE, sys.executable, "-m", "client.cli.app", "serve", str(node_file)]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(process, folder)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def wait_for(process: subprocess.Popen, folder: Path) -> None:
    """Until the agent answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            line.hello(folder / "agent.sock", timeout_s=1)
            return
        except TransportError:
            time.sleep(0.2)
    pytest.fail((folder / "serve.log").read_text())


@needs_namespace
def test_an_agent_without_any_route_plays_a_round(agent, folder, engine):
    routes = Path(f"/proc/{agent.pid}/net/route").read_text().splitlines()
    devices = re.findall(r"^\s*(\S+):", Path(f"/proc/{agent.pid}/net/dev").read_text(), re.MULTILINE)
    assert (routes[1:], devices) == ([], ["lo"])  # no line under the heading, and a loopback that is down
    limits = Path(f"/proc/{agent.pid}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0\s", limits)

    run = RunManifest(tiny.settings("tiny"), engine.base_sha256, engine.tensor_specs)
    offer = sign(run, vault.OPERATOR, federation="onco-eu", not_after=int(time.time()) + 3600)
    requests = {
        "open": offer.to_frame(),
        "train": Frame(
            "train",
            {**to_head(RoundPlan(run.sha256, 0)), **vault.TOLD},
            adapter.encode(engine.initial, dtype="float32"),
        ),
    }
    for kind, request in requests.items():
        answer = line.call(folder / "agent.sock", kind, wire.pack(request), 60.0)
        found = wire.unpack(answer, max_body_bytes=1 << 24).kind
        assert found == {"open": "opened", "train": "update"}[kind], (folder / "log" / "agent.jsonl").read_text()


@needs_namespace
def test_control_such_a_namespace_reaches_nothing():
    code = "import socket; socket.create_connection(('192.0.2.1', 9), timeout=3)"
    done = subprocess.run([*UNSHARE, sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert "unreachable" in done.stderr.lower()


def test_a26_an_agent_whose_policy_was_edited_does_not_start(folder, node_file):
    node = config.load_node(node_file)
    serve.make_agent(node)
    policy = folder / "policy.toml"
    policy.write_text(policy.read_text().replace("min_records = 9", "min_records = 1"))
    with pytest.raises(PolicyRefusedError, match="not what its admin signed"):
        serve.make_agent(node)


def test_an_agent_whose_key_others_may_read_does_not_start(folder, node_file):
    node = config.load_node(node_file)
    (folder / "site.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="0600"):
        serve.make_agent(node)
    (folder / "site.pem").chmod(0o600)
    serve.make_agent(node)
