"""The guard of `tests/guard.py` itself."""

import socket
import subprocess
import sys

import pytest


def test_connections_and_look_ups_beyond_this_machine_are_refused(refused_connections):
    with pytest.raises(PermissionError):
        socket.getaddrinfo("telemetry.example", 443)
    with socket.socket() as probe, pytest.raises(PermissionError):
        probe.connect(("192.0.2.1", 9))
    assert len(refused_connections.read_text().splitlines()) == 2
    refused_connections.write_text("")


def test_a_childs_reach_is_written_down(refused_connections):
    code = "import socket\ntry: socket.getaddrinfo('telemetry.example', 443)\nexcept PermissionError: print('refused')"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert told.stdout == "refused\n"
    assert "telemetry.example" in refused_connections.read_text()
    refused_connections.write_text("")


def test_loopback_and_unix_sockets_are_free(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    assert socket.getaddrinfo("localhost", 80)
