"""What the doctor finds on a site's machine: socket, agent, core dumps, Flower's reporting."""

import grp
import os
import socket

import pytest

from client.agent import process
from client.courier import door
from client.doctor import host
from tests.connect_proxy import ConnectProxy

QUIET_UNIT = "[Service]\nLimitCORE=0\nEnvironment=FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1\n"


def test_a_socket_folder_that_others_may_write(site):
    (site.folder / "run").chmod(0o777)
    found = site.find("agent's socket")
    assert (found.status, "0700" in found.remedy) == ("failed", True)
    (site.folder / "run").rmdir()
    assert site.find("agent's socket").status == "failed"


def test_a_courier_whose_group_is_missing_or_cannot_enter(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    path = folder / "agent.sock"
    own = grp.getgrgid(os.getegid()).gr_name
    assert "there is no group" in host.socket_folder(path, courier_group="no-such-group").found
    assert "cannot enter" in host.socket_folder(path, courier_group=own).found
    folder.chmod(0o750)
    assert host.socket_folder(path, courier_group=own).status == "ok"


def test_an_agent_that_runs_and_one_that_has_gone(site):
    path = site.folder / "run" / "agent.sock"
    server = door.serve(bytes, socket_path=path, max_message_bytes=1 << 20)
    try:
        found = {result.name: result for result in site.examine().results}
        assert (found["agent"].status, "idle" in found["agent"].found) == ("ok", True)
        assert host.agent_pid(path) == os.getpid()
        assert "began without a policy" in found["policy in force"].found
        process.make_guard(site.node)
        assert site.find("policy in force").status == "ok"
        site.sign(serial="4")
        edited = site.find("policy in force")
        assert (edited.status, "systemctl restart" in edited.remedy) == ("failed", True)
        assert "began with serial 3; the file, with serial 4" in edited.found
        assert host.core_limit(os.getpid()) is not None
    finally:
        server.stop(None).wait()
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert (site.find("agent").status, host.agent_pid(path)) == ("failed", None)


def test_the_gateway_is_asked_through_the_proxy_of_the_sites_file(site):
    with ConnectProxy(answer=lambda near: near.sendall(b"HTTP/1.1 403 No\r\n\r\n")) as between:
        site.edit("[agent]", f'[link]\nproxy = "http://127.0.0.1:{between.port}"\n\n[agent]')
        found = site.find("gateway", gateway="gate.example:9443")
    assert (found.status, found.found) == ("failed", f"the proxy 127.0.0.1:{between.port} forbids a tunnel (403)")
    assert "allow CONNECT to gate.example:9443" in found.remedy


@pytest.mark.parametrize(
    ("limit", "unit", "pattern", "status"),
    [
        ("0", None, "core", "ok"),
        (None, QUIET_UNIT, "core", "ok"),
        (None, QUIET_UNIT, "|/usr/lib/systemd/systemd-coredump %P", "ok"),
        ("0", None, "|/usr/share/apport/apport -p%p", "warning"),
        ("unlimited", QUIET_UNIT, "core", "failed"),
        (None, "[Service]\n# LimitCORE=0\n", "core", "warning"),
        (None, None, "core", "skipped"),
    ],
)
def test_core_dumps(limit, unit, pattern, status):
    assert host.core_dumps(limit, unit=unit, pattern=pattern).status == status


def test_reporting_of_flower(site):
    unit = site.keys / host.COURIER_UNIT
    assert site.find("Flower's reporting").status == "ok"
    unit.write_text(unit.read_text().replace("FLWR_TELEMETRY_ENABLED=0", ""))
    found = site.find("Flower's reporting")
    assert (found.status, "FLWR_TELEMETRY_ENABLED=0" in found.found) == ("failed", True)
    drop_ins = unit.with_name(f"{unit.name}.d")
    drop_ins.mkdir()
    (drop_ins / "quiet.conf").write_text("[Service]\nEnvironment=FLWR_TELEMETRY_ENABLED=0\n")
    assert site.find("Flower's reporting").status == "ok"
    (drop_ins / "zoisy.conf").write_text("[Service]\nEnvironment=FLWR_DISABLE_UPDATE_CHECK=0\n")
    assert site.find("Flower's reporting").status == "failed"
    assert host.reporting({}).status == "skipped"
    assert host.reporting({host.COURIER_UNIT: 'Environment="A=1'}).status == "failed"
