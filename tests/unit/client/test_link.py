import asyncio
import gzip
import hashlib
import logging
import random
import socket
import ssl
import stat
from dataclasses import dataclass, field

import pytest
from flwr.proto.fab_pb2 import Fab, GetFabResponse

from client import bundle, link, relay
from common.errors import ConfigError
from server import link as server_link
from tests.attacks.pki import Pki
from tests.federations import shake_hands

ASK = b"POST " + bundle.PATH + b" HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"


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


def carry(tmp_path, pki, remote, *, requests: bytes = ASK, bundles=(bundle.SHA256,)) -> bytes:
    """Send requests through a tunnel; what came back until the end."""

    async def run() -> bytes:
        inward, ended = link.inward_context(tmp_path), asyncio.Event()

        async def accept(reader, writer):
            await link._carry(reader, writer, outward(pki), remote=remote, bundles=bundles)
            ended.set()

        async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=inward) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=node_side(tmp_path))
            writer.write(requests)
            try:
                return await asyncio.wait_for(reader.read(), 10)
            except ConnectionError:
                return b""
            finally:
                writer.close()
                await ended.wait()

    return asyncio.run(run())


@dataclass
class Gateway:
    """What is at the far end: answers each request with the next of its answers, and keeps what it heard."""

    pki: Pki
    answers: tuple[bytes, ...]
    heard: bytearray = field(default_factory=bytearray)
    subjects: list = field(default_factory=list)

    async def answer(self, reader, writer) -> None:
        self.subjects.append(writer.get_extra_info("peercert")["subject"])
        for answer in self.answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")), b": 0"
            )
            self.heard += head + await reader.readexactly(int(length.split(b": ")[1]))
            writer.write(answer)
            await writer.drain()
        await self.close(writer)

    async def close(self, writer) -> None:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    def through(self, tmp_path, **options) -> bytes:
        """What a SuperNode behind the tunnel gets."""

        async def run() -> bytes:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(self.pki.folder / "gateway.pem", self.pki.folder / "gateway.key")
            context.load_verify_locations(self.pki.folder / "root-ca.pem")
            async with await asyncio.start_server(self.answer, "127.0.0.1", 0, ssl=context) as server:
                address = server.sockets[0].getsockname()
                return await asyncio.to_thread(carry, tmp_path, self.pki, address, **options)

        return asyncio.run(run())


def http(body: bytes, *, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


def with_bundle(content: bytes) -> bytes:
    return GetFabResponse(fab=Fab(hash_str="as the coordinator says", content=content)).SerializeToString()


def test_a_gateway_that_is_away_looks_like_a_closed_connection_and_is_told(tmp_path, pki, caplog):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with caplog.at_level(logging.WARNING):
            assert carry(tmp_path, pki, ("127.0.0.1", nobody.getsockname()[1])) == b""
    assert "no connection to the gateway at 127.0.0.1" in caplog.text


def test_requests_and_answers_pass_and_the_gateway_sees_the_sites_certificate(tmp_path, pki):
    piece = b"ping\n" * 1_000_000
    post = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: a\r\ncontent-length: 5000000\r\n\r\n" + piece
    gateway = Gateway(pki, (http(b"first"), http(piece, more="x-own: 1\r\n")))
    came = gateway.through(tmp_path, requests=ASK.replace(bundle.PATH, b"/v1/fleet/get-run") + post)
    assert came == http(b"first") + http(piece, more="x-own: 1\r\n")
    assert bytes(gateway.heard) == ASK.replace(bundle.PATH, b"/v1/fleet/get-run") + post
    assert gateway.subjects == [((("commonName", "alder"),),)]


def test_an_answer_before_the_request_has_ended_arrives_and_ends_the_connection(tmp_path, pki):
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n"

    class Early(Gateway):
        async def answer(self, reader, writer) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(http(b"", status="413 Payload Too Large"))
            await writer.drain()
            await reader.read(1)
            await self.close(writer)

    assert Early(pki, ()).through(tmp_path, requests=head + b"abc").startswith(b"HTTP/1.1 413")


def test_the_hash_that_the_link_knows_is_that_of_the_bundle_that_this_release_makes():
    assert hashlib.sha256(server_link.build_bundle()).hexdigest() == bundle.SHA256


def test_a01_bundle_with_one_changed_byte_is_not_handed_to_the_supernode(tmp_path, pki, caplog):
    good, dice = server_link.build_bundle(), random.Random(1)
    for _ in range(20):
        bad = bytearray(good)
        bad[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
        caplog.clear()
        came = Gateway(pki, (http(with_bundle(bytes(bad))),)).through(tmp_path)
        assert (came[:12], came[-4:]) == (b"HTTP/1.1 403", b"\r\n\r\n")
        assert f"refused: bundle {hashlib.sha256(bad).hexdigest()} is not allowed here" in caplog.text
    came = Gateway(pki, (http(with_bundle(good)),)).through(tmp_path)
    assert came.endswith(GetFabResponse(fab=Fab(hash_str=bundle.SHA256, content=good)).SerializeToString())


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (http(b""), "is not allowed here"),
        (http(b"\xff" * 50), "what came is no bundle"),
        (
            http(gzip.compress(with_bundle(server_link.build_bundle())), more="content-encoding: gzip\r\n"),
            "is no bundle",
        ),
        (http(bytes(bundle.MAX_BYTES + 1)), "a bundle above"),
        (http(b"", status="307 Temporary Redirect", more="location: https://other.example/\r\n"), "a redirect"),
        (http(with_bundle(server_link.build_bundle()) + with_bundle(b"code")), "is not allowed here"),
    ],
)
def test_a01_answers_that_are_no_listed_bundle(tmp_path, pki, caplog, answer, told):
    assert Gateway(pki, (answer,)).through(tmp_path).startswith(b"HTTP/1.1 403")
    assert told in caplog.text


@pytest.mark.parametrize("coding", ["gzip", "GZIP, identity", "br", "identity\r\ncontent-encoding: deflate"])
def test_an_answer_that_would_grow_at_the_supernode_is_refused(tmp_path, pki, caplog, coding):
    """Flower's client unpacks what comes so: 306 kB become 300 MiB. Control: the same bytes without the header pass."""
    bomb, ask = gzip.compress(bytes(1 << 24)), ASK.replace(bundle.PATH, b"/v1/fleet/pull-object")
    answer = http(bomb, more=f"content-encoding: {coding}\r\n")
    assert Gateway(pki, (answer,)).through(tmp_path, requests=ask).startswith(b"HTTP/1.1 403")
    assert "refused: a compressed answer" in caplog.text
    plain = http(bomb, more="content-encoding: identity\r\n")
    assert Gateway(pki, (plain,)).through(tmp_path, requests=ask) == plain


def test_an_answer_without_end_is_cut(tmp_path, pki, caplog):
    ask, most = ASK.replace(bundle.PATH, b"/v1/fleet/pull-object"), relay.MAX_ANSWER_BYTES
    assert len(Gateway(pki, (http(bytes(most + (1 << 20))),)).through(tmp_path, requests=ask)) < most + 1000
    assert "refused: an answer above" in caplog.text


def test_a01_control_a_site_may_list_another_bundle(tmp_path, pki):
    other = b"another bundle"
    answer = (http(with_bundle(other)),)
    assert other in Gateway(pki, answer).through(tmp_path, bundles=(hashlib.sha256(other).hexdigest(),))
    assert other not in Gateway(pki, answer).through(tmp_path)


def test_a_refusal_of_the_gateway_is_handed_on_as_it_is(tmp_path, pki):
    answer = http(b"", status="403 Forbidden", more="connection: close\r\n")
    assert Gateway(pki, (answer,)).through(tmp_path) == answer
