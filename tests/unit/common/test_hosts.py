"""Where a server listens: both kinds of addresses, and an error that names what to change."""

import socket

import pytest

from common import hosts
from common.errors import ConfigError
from tests.hosts import NEEDS_IPV6


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::1", marks=NEEDS_IPV6)])
def test_a_port_that_is_taken_is_told_with_what_to_change(host):
    with hosts.listen(host, 0, options="--port") as taken:
        port = taken.getsockname()[1]
        socket.create_connection((host, port)).close()
        with pytest.raises(ConfigError) as caught:
            hosts.listen(host, port, options="--port")
    assert f"{hosts.in_url(host)}:{port} (Address already in use" in str(caught.value)
    assert "choose another with --port" in str(caught.value)
    hosts.listen(host, port, options="--port").close()  # control
