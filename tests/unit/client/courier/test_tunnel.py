import asyncio
import gzip
import hashlib
import logging
import random
import socket
import ssl
import stat
import time
from dataclasses import dataclass, field

import pytest
from flwr.proto.fab_pb2 import Fab, GetFabResponse

from client.courier import bundle, proxy, relay, tunnel
from common.errors import ConfigError, TransportError
from common.run import config
from server.run import link as server_link
from tests.attacks.pki import Pki
from tests.connect_proxy import ConnectProxy
from tests.samples.federations import shake_hands

ASK = b"POST " + bundle.PATH + b" HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Pki:
    made = Pki(tmp_path_factory.mktemp("pki"))
    made.issue("gateway", made.servers, host="127.0.0.1")
    made.issue("alder", made.sites)
    return made


def outward(pki: Pki) -> ssl.SSLContext:
    files = {"certificate_file": pki.folder / "alder.pem", "key_file": pki.folder / "alder.key"}
    return tunnel.outward_context(ca_file=pki.folder / "root-ca.pem", **files)


def node_side(state) -> ssl.SSLContext:
    """As Flower's client makes it of `--root-certificates`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=(state / tunnel.CERTIFICATE).read_text())
    return context


def test_the_tunnels_own_certificate_is_for_loopback_made_once_and_its_key_private(tmp_path):
    state = tmp_path / "state"
    first = tunnel.inward_context(state)
    made = (state / tunnel.CERTIFICATE).read_bytes()
    assert stat.S_IMODE((state / tunnel.KEY).stat().st_mode) == 0o600
    second = tunnel.inward_context(state)
    assert (state / tunnel.CERTIFICATE).read_bytes() == made
    for context in (first, second):
        assert shake_hands(context, node_side(state), host="127.0.0.1")[0] == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(first, node_side(state), host="gateway.example")


def test_a_start_that_was_interrupted_is_begun_anew(tmp_path):
    tunnel.inward_context(tmp_path)
    (tmp_path / tunnel.CERTIFICATE).unlink()
    shake_hands(tunnel.inward_context(tmp_path), node_side(tmp_path), host="127.0.0.1")


def test_keys_that_others_may_read_are_refused(tmp_path, pki):
    tunnel.inward_context(tmp_path)
    (tmp_path / tunnel.KEY).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        tunnel.inward_context(tmp_path)
    (pki.folder / "alder.key").chmod(0o644)
    try:
        with pytest.raises(ConfigError, match="chmod 600"):
            outward(pki)
    finally:
        (pki.folder / "alder.key").chmod(0o600)


@pytest.mark.parametrize("address", ["gateway", ":1", "gateway:", "gateway:https"])
def test_an_address_without_host_or_port_is_refused(address, tmp_path):
    with pytest.raises(ConfigError, match="write host:port"):
        tunnel.run(
            gateway=address, ca_file=tmp_path, certificate_file=tmp_path, key_file=tmp_path, state=tmp_path, port=1
        )


def carry(tmp_path, pki, remote, *, requests: bytes = ASK, bundles=(bundle.SHA256,), by=None) -> bytes:
    """Send requests through a tunnel; what came back until the end."""

    async def run() -> bytes:
        inward, ended = tunnel.inward_context(tmp_path), asyncio.Event()

        async def accept(reader, writer):
            await tunnel._carry(reader, writer, tunnel.Way(remote, outward(pki), by), bundles=bundles)
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


ANSWER = http(b"the gateway's own words")
ASK_RUN = ASK.replace(bundle.PATH, b"/v1/fleet/get-run")


def test_through_a_proxy_the_gateway_sees_the_sites_certificate_and_the_proxy_sees_no_word(tmp_path, pki, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # which nobody reads
    with ConnectProxy(password="alder:secret word") as between:
        gateway = Gateway(pki, (ANSWER,))
        way = between.way(tmp_path, password="alder:secret word")
        assert gateway.through(tmp_path, requests=ASK_RUN, by=way) == ANSWER
    assert gateway.subjects == [((("commonName", "alder"),),)]
    assert len(between.asked) == 1
    assert between.asked[0].startswith(b"CONNECT 127.0.0.1:")
    assert len(between.passed) > 1000
    assert b"words" not in between.passed
    assert b"fleet" not in between.passed
    assert "secret" not in repr(way)


def test_without_a_proxy_none_is_passed_whatever_the_environment_says(tmp_path, pki, monkeypatch):
    with ConnectProxy() as between:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{between.port}")
        assert Gateway(pki, (ANSWER,)).through(tmp_path, requests=ASK_RUN) == ANSWER
    assert between.asked == []


def test_a_proxy_that_opens_tls_is_refused_by_its_certificate_and_hears_nothing(tmp_path, pki, caplog):
    (tmp_path / "other").mkdir()
    other = Pki(tmp_path / "other")  # the proxy's own authority, as a company installs it on its machines
    other.issue("gateway", other.servers, host="127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(other.folder / "gateway.pem", other.folder / "gateway.key")
    with ConnectProxy(opens_tls=context) as between:
        gateway = Gateway(pki, (ANSWER,))
        assert gateway.through(tmp_path, requests=ASK_RUN, by=between.way(tmp_path)) == b""
    assert (len(between.asked), bytes(between.passed), gateway.subjects) == (1, b"", [])
    assert "its certificate is not accepted" in caplog.text
    assert "must pass TLS to the gateway on unopened" in caplog.text


def test_control_the_same_proxy_with_a_certificate_of_the_federation_would_have_been_believed(tmp_path, pki):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.folder / "gateway.pem", pki.folder / "gateway.key")
    with ConnectProxy(opens_tls=context) as between:
        Gateway(pki, (ANSWER,)).through(tmp_path, requests=ASK_RUN, by=between.way(tmp_path))
    assert between.passed.startswith(b"POST /v1/fleet/get-run")


def says(text: bytes):
    return lambda near: near.sendall(text)


def drips(near: socket.socket) -> None:
    while True:
        near.sendall(b"H")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (says(b"HTTP/1.1 407 No\r\nproxy-authenticate: Basic realm=x\r\n\r\n"), "name it as link.proxy_auth_file"),
        (says(b"HTTP/1.1 407 No\r\nproxy-authenticate: NTLM\r\n\r\n"), "takes NTLM only"),
        (says(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"), "to allow CONNECT to gate.example:9443"),
        (says(b"HTTP/1.1 502 Bad Gateway\r\n\r\n"), "does not reach gate.example:9443 (502)"),
        (says(b"HTTP/1.1 405 No\r\n\r\n"), "answered 405 to CONNECT"),
        (says(b"SSH-2.0-OpenSSH_9.6\r\n"), "does not answer as an HTTP proxy does"),
        (says(b"\x15\x03\x01\x00\x02\x02\x0a"), "without TLS to itself"),
        (says(b"HTTP/1.1 200 OK\r\n" + b"x: " + bytes([65]) * 20_000), "does not answer as an HTTP proxy does"),
        (says(b"HTTP/1.1 200 OK\r\n\r\nHello"), "does not answer as an HTTP proxy does"),
        (says(b""), "closed the connection"),
        (lambda near: near.recv(1), "did not open a tunnel within 0.3 s"),
        (drips, "did not open a tunnel within 0.3 s"),
        (says(b"HTTP/1.1 100 Continue\r\n\r\n" * 3), "closed the connection"),
    ],
)
def test_a_proxy_that_opens_no_tunnel_is_told_with_a_remedy(tmp_path, answer, told):
    with ConnectProxy(answer=answer) as between, pytest.raises(TransportError) as caught:
        proxy.connect(between.way(tmp_path), ("gate.example", 9443), timeout_s=0.3)
    assert told in str(caught.value)
    assert f"127.0.0.1:{between.port}" in str(caught.value)
    assert "; " in str(caught.value)  # a remedy


def test_a_password_that_the_proxy_does_not_take_is_told_by_its_file(tmp_path):
    with ConnectProxy(password="alder:right") as between, pytest.raises(TransportError) as caught:
        proxy.connect(between.way(tmp_path, password="alder:wrong"), ("127.0.0.1", 9), timeout_s=5)
    assert f"correct {tmp_path / 'proxy.auth'}" in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_no_proxy_where_one_is_named_is_told_in_the_links_log(tmp_path, pki, caplog):
    with ConnectProxy() as between:
        way = between.way(tmp_path)
    assert Gateway(pki, (ANSWER,)).through(tmp_path, by=way) == b""
    assert f"the proxy 127.0.0.1:{way.port} cannot be reached" in caplog.text


@pytest.mark.parametrize(("text", "mode", "told"), [("a:b", 0o644, "chmod 600"), ("alder", 0o600, "NAME:PASSWORD")])
def test_a_file_of_the_password_that_is_open_or_has_none_is_refused(tmp_path, text, mode, told):
    (tmp_path / "auth").write_text(text)
    (tmp_path / "auth").chmod(mode)
    settings = {"proxy": "http://proxy.example:3128", "proxy_auth_file": str(tmp_path / "auth")}
    with pytest.raises(ConfigError, match=told):
        proxy.of_site(config.LinkConfig.model_validate(settings))


@pytest.mark.parametrize(
    "line",
    ['proxy = "https://p:1"', 'proxy = "p:1"', 'proxy = "http://me:secret@p:1"', 'proxy_auth_file = "f"'],
)
def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(line):
    with pytest.raises(ConfigError) as caught:
        config.parse_node(f'[site]\nname = "north"\n[data]\npath = "x"\n[link]\n{line}', name="node.toml")
    assert "link.proxy" in str(caught.value)
    assert "secret" not in str(caught.value)
    if "secret" in line:
        assert "without name and password" in str(caught.value)
