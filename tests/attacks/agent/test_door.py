"""A18 and A25: bytes and callers at the agent's door, before anything is computed."""

import grp
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from client.courier import door as service
from client.courier import doorkeeper, line
from common.adapter import adapter
from common.errors import ConfigError, ModelError, WireError
from common.frame import wire

NUM_FLIPS = 20_000
CONNECT = """
import os, pwd, socket, sys
nobody = pwd.getpwnam("nobody")
os.setgroups([]), os.setgid(nobody.pw_gid), os.setuid(nobody.pw_uid)
door = socket.socket(socket.AF_UNIX)
door.connect(sys.argv[1])
door.settimeout(2)
try:
    print("closed" if not door.recv(1) else "open", end="")
except TimeoutError:
    print("open", end="")
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may act as another user")


def flipped(body: bytes, bit: int) -> bytes:
    changed = bytearray(body)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def header_bits(body: bytes) -> int:
    """Bits of a safetensors header, its length included."""
    return 8 * (8 + int.from_bytes(body[:8], "little"))


def test_a18_bit_flips_in_a_tensor_header_are_refused_or_mean_the_same(engine):
    body, specs = adapter.encode(engine.initial, dtype="float32"), engine.tensor_specs
    num_bits, dice = header_bits(body), random.Random(18)
    bits = [dice.randrange(num_bits) for _ in range(NUM_FLIPS)]
    refused = 0
    for bit in bits:
        try:
            found = adapter.decode(flipped(body, bit), specs, dtype="float32")
        except (WireError, ModelError):
            refused += 1
            continue
        assert adapter.specs(found) == specs
        assert {tensor.dtype for tensor in found.values()} == {tensor.dtype for tensor in engine.initial.values()}
    assert refused > 0.99 * NUM_FLIPS
    assert adapter.decode(body, specs, dtype="float32").keys() == engine.initial.keys()


def test_a18_bit_flips_are_refused_by_a_site_and_logged(open_site):
    body, dice = adapter.encode(open_site.engine.initial, dtype="float32"), random.Random(25)
    for _ in range(100):
        answer = open_site.step(state=flipped(body, dice.randrange(64, header_bits(body))))
        assert open_site.refused(answer)[0] in ("WireError", "ModelError")
    assert open_site.step(state=body).kind == "update"


@pytest.fixture
def door(open_site):
    """The socket of a site that takes part in a run."""
    with tempfile.TemporaryDirectory(prefix="silotune-", dir="/tmp") as folder:
        path = Path(folder) / "agent.sock"
        agent = open_site.agent
        server = service.serve(agent.answer, socket_path=path, max_message_bytes=1 << 20, on_stranger=agent.sent_away)
        yield path
        server.stop(0).wait()


def knock(door: Path) -> subprocess.CompletedProcess[str]:
    """Another user of this machine tries the socket."""
    command = [sys.executable, "-I", "-S", "-c", CONNECT, str(door)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_root
@pytest.mark.parametrize("folder_mode", [0o700, 0o755])
def test_a25_another_local_user_at_the_agents_socket(door, folder_mode):
    door.parent.chmod(folder_mode)
    assert "PermissionError" in knock(door).stderr
    assert line.hello(door).wire_version == wire.VERSION


@needs_root
def test_a25_another_local_user_where_the_modes_let_everybody_in(door, open_site, monkeypatch):
    door.parent.chmod(0o755)
    door.chmod(0o666)
    assert knock(door).stdout == "closed"
    wait_until(lambda: open_site.log()[-1].kind == "refused")
    assert open_site.log()[-1].facts["rule"] == "AuthError"
    assert line.hello(door).wire_version == wire.VERSION
    monkeypatch.setattr(doorkeeper, "credentials", lambda caller: (os.getuid(), set()))
    assert knock(door).stdout == "open"  # control: it is the kernel's word that keeps others out


@needs_root
def test_a25_grpcs_own_socket_is_for_the_agents_user_alone(door):
    door.parent.chmod(0o755)
    inner = door.with_name(door.name + service.INNER_SUFFIX)
    assert inner.stat().st_mode & 0o777 == 0o600
    assert "PermissionError" in knock(inner).stderr


def wait_until(holds, *, timeout_s: float = 10.0) -> None:
    """The doorkeeper works in a thread of its own."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a25_a_folder_in_which_others_may_write_is_no_place_for_the_socket(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="open to other users"):
        service.serve(lambda frame: frame, socket_path=tmp_path / "open" / "agent.sock", max_message_bytes=1)


def test_a25_oversized_call_is_refused_before_it_is_parsed(door, open_site, caplog, monkeypatch):
    seen = []
    unpack = wire.unpack
    monkeypatch.setattr(wire, "unpack", lambda data, **limits: seen.append(len(data)) or unpack(data, **limits))
    with pytest.raises(WireError, match="too long"):
        line.call(door, "train", bytes((1 << 20) + 1), 5.0)
    assert seen == []
    assert "refused a frame" in caplog.text
    line.call(door, "train", bytes(1 << 20), 5.0)  # control: at the limit it is looked at, and is no frame
    assert seen == [1 << 20]
    assert open_site.log()[-1].facts["rule"] == "WireError"


@needs_root
@pytest.mark.parametrize(("groups", "expected"), [("[1]", "open"), ("[2]", "closed")])
def test_a25_the_couriers_group_comes_in_and_no_other(open_site, groups, expected):
    """A courier under another user, whose supplementary groups the kernel tells."""
    with tempfile.TemporaryDirectory(prefix="silotune-", dir="/tmp") as folder:
        path = Path(folder) / "agent.sock"
        group = grp.getgrgid(1).gr_name
        server = service.serve(open_site.agent.answer, socket_path=path, max_message_bytes=1 << 20, courier_group=group)
        Path(folder).chmod(0o755)
        path.chmod(0o666)
        command = [sys.executable, "-I", "-S", "-c", CONNECT.replace("os.setgroups([])", f"os.setgroups({groups})")]
        told = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False).stdout
        server.stop(0).wait()
    assert told == expected
