import asyncio
import logging
import socket
import ssl
import stat

import pytest

from client import link
from common.errors import ConfigError
from tests.attacks.pki import Pki
from tests.federations import shake_hands


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Pki:
    made = Pki(tmp_path_factory.mktemp("pki"))
    made.issue("gateway", made.servers, host="127.0.0.1")
    made.issue("alder", made.sites)
    return made


def outward(pki: Pki) -> ssl.SSLContext:
    files = {"certificate_file": pki.folder / "alder.pem", "key_file": pki.folder / "alder.key"}
    return link.outward_context(ca_file=pki.folder / "root-ca.pem", **files)


def node_side(state) -> ssl.SSLContext:
    """As Flower's client makes it of `--root-certificates`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=(state / link.CERTIFICATE).read_text())
    return context


def test_the_tunnels_own_certificate_is_for_loopback_made_once_and_its_key_private(tmp_path):
    state = tmp_path / "state"
    first = link.inward_context(state)
    made = (state / link.CERTIFICATE).read_bytes()
    assert stat.S_IMODE((state / link.KEY).stat().st_mode) == 0o600
    second = link.inward_context(state)
    assert (state / link.CERTIFICATE).read_bytes() == made
    for context in (first, second):
        assert shake_hands(context, node_side(state), host="127.0.0.1")[0] == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(first, node_side(state), host="gateway.example")


def test_a_start_that_was_interrupted_is_begun_anew(tmp_path):
    link.inward_context(tmp_path)
    (tmp_path / link.CERTIFICATE).unlink()
    shake_hands(link.inward_context(tmp_path), node_side(tmp_path), host="127.0.0.1")


def test_keys_that_others_may_read_are_refused(tmp_path, pki):
    link.inward_context(tmp_path)
    (tmp_path / link.KEY).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        link.inward_context(tmp_path)
    (pki.folder / "alder.key").chmod(0o644)
    try:
        with pytest.raises(ConfigError, match="chmod 600"):
            outward(pki)
    finally:
        (pki.folder / "alder.key").chmod(0o600)


@pytest.mark.parametrize("address", ["gateway", ":1", "gateway:", "gateway:https"])
def test_an_address_without_host_or_port_is_refused(address, tmp_path):
    with pytest.raises(ConfigError, match="write host:port"):
        link.run(
            gateway=address, ca_file=tmp_path, certificate_file=tmp_path, key_file=tmp_path, state=tmp_path, port=1
        )


def carry(tmp_path, pki, remote) -> bytes:
    """Send one line through a tunnel; what came back until the end."""

    async def run() -> bytes:
        inward = link.inward_context(tmp_path)

        async def accept(reader, writer):
            await link._carry(reader, writer, outward(pki), remote=remote)

        async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=inward) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=node_side(tmp_path))
            writer.write(b"ping\n")
            try:
                return await asyncio.wait_for(reader.read(), 10)
            except ConnectionError:
                return b""
            finally:
                writer.close()

    return asyncio.run(run())


def test_a_gateway_that_is_away_looks_like_a_closed_connection_and_is_told(tmp_path, pki, caplog):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with caplog.at_level(logging.WARNING):
            assert carry(tmp_path, pki, ("127.0.0.1", nobody.getsockname()[1])) == b""
    assert "no connection to the gateway at 127.0.0.1" in caplog.text


def test_bytes_pass_both_ways_and_the_gateway_sees_the_sites_certificate(tmp_path, pki):
    seen = []

    async def gateway(reader, writer):
        seen.append(writer.get_extra_info("peercert")["subject"])
        writer.write((await reader.readline()) * 100_000)
        await writer.drain()
        writer.close()

    async def run() -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(pki.folder / "gateway.pem", pki.folder / "gateway.key")
        context.load_verify_locations(pki.folder / "root-ca.pem")
        async with await asyncio.start_server(gateway, "127.0.0.1", 0, ssl=context) as server:
            return await asyncio.to_thread(carry, tmp_path, pki, server.sockets[0].getsockname())

    assert asyncio.run(run()) == b"ping\n" * 100_000
    assert seen == [((("commonName", "alder"),),)]
