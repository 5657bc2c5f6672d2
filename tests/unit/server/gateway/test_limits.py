import asyncio
import json
import socket
import ssl
import stat
from pathlib import Path

import httpx
import pytest

from common.errors import ConfigError
from server.gateway import proxy, rules, serve, settings, tls
from server.gateway.connection import PEER
from server.gateway.limits import Buckets
from server.gateway.members import Members
from server.gateway.proxy import Gate, Proxy
from server.gateway.refusals import RefusalLog
from server.gateway.tls import Peer
from tests.attacks.pki import Pki
from tests.attacks.world import LIMITS, SETTINGS

PATH = "/v1/fleet/get-run"


def config(**changes: str) -> settings.GatewayConfig:
    text = SETTINGS.format(superlink="127.0.0.1:1", keys="/keys", fleet=2, control=3, bundles=[], **LIMITS)
    for old, new in changes.items():
        text = text.replace(old.replace("_IS_", " = "), new)
    return settings.parse(text, name="GATEWAY.toml")


def log_in(folder: Path, clock=lambda: 0.0) -> RefusalLog:
    return RefusalLog(folder / "log", wall_clock=lambda: 1.5, clock=clock)


def ask(folder: Path, answer, *, limits="", content=b"abc", method="POST", gate_more=None, expires_at=2.0):
    """Send one request through a proxy whose SuperLink is a function; the response and the reasons in the log."""
    limits = settings.LimitsConfig.model_validate(limits or {})
    gate = Gate("fleet", rules.FLEET_PATHS, 1000, lambda *_: None, {}, frozenset(), **(gate_more or {}))
    log = log_in(folder)

    async def run():
        upstream = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="https://superlink")
        buckets = Buckets(per_s=1.0, burst=1, clock=lambda: 0.0)
        app = Proxy(gate, lambda: Members({}, frozenset()), buckets, limits, upstream, log, lambda: 1.5)

        async def with_peer(scope, receive, send):
            scope["state"] = {PEER: Peer("alder", "a" * 64, expires_at)}
            await app(scope, receive, send)

        async with (
            upstream,
            httpx.AsyncClient(transport=httpx.ASGITransport(with_peer), base_url="https://gateway") as client,
        ):
            return [await client.request(method, PATH, content=content) for _ in range(2)]

    answers = asyncio.run(run())
    log.close()
    return answers, [json.loads(line)["reason"] for line in (folder / "log").read_text().splitlines()]


def ok(_request: httpx.Request) -> httpx.Response:
    async def pieces():
        yield b"answer"

    return httpx.Response(200, content=pieces(), headers={"set-cookie": "a=b"})


def test_a_request_is_passed_on_and_the_next_one_is_too_many(tmp_path):
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return ok(request)

    (first, second), reasons = ask(tmp_path, answer)
    assert (first.status_code, first.content, "set-cookie" in first.headers) == (200, b"answer", False)
    assert (second.status_code, second.json(), reasons) == (503, {"detail": "rate"}, ["rate"])
    assert [request.url for request in seen] == [f"https://superlink{PATH}"]


def test_a_certificate_that_ends_while_connected_is_refused(tmp_path):
    (first, _), reasons = ask(tmp_path, ok, expires_at=1.0)
    assert (first.status_code, reasons[0]) == (403, "expired")


def test_redirects_are_not_followed(tmp_path):
    (first, _), reasons = ask(tmp_path, lambda _: httpx.Response(307, headers={"location": "https://elsewhere/"}))
    assert (first.status_code, "location" in first.headers, reasons[0]) == (502, False, "redirect")


def test_an_absent_superlink_is_an_answer_that_flower_tries_again(tmp_path):
    def absent(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    (first, _), reasons = ask(tmp_path, absent)
    assert (first.status_code, reasons[0]) == (502, "superlink")


def test_an_exchange_has_an_end(tmp_path):
    async def slow(_request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(20)
        return httpx.Response(200)

    (first, _), reasons = ask(tmp_path, slow, limits={"exchange_timeout_s": 0.1})
    assert (first.status_code, reasons[0]) == (504, "slow_exchange")


def test_a_body_of_unknown_length_is_cut_at_the_cap(tmp_path):
    async def pieces():
        for _ in range(30):
            yield bytes(100)

    async def answer(request: httpx.Request) -> httpx.Response:
        await request.aread()
        return httpx.Response(200)

    (first, _), reasons = ask(tmp_path, answer, content=pieces())
    assert (first.status_code, reasons[0]) == (413, "body_size")


def test_the_log_holds_one_line_a_refusal_and_is_not_filled_by_one_caller(tmp_path):
    now = [0.0]
    log = log_in(tmp_path, lambda: now[0])
    for _ in range(300):
        log.write("fleet", "path", status=404, certificate='al"der\n')
    log.write("fleet", "path", certificate="birch")
    now[0] = 1.0
    log.write("fleet", "path", certificate='al"der\n')
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == 202
    expected = {
        "time": 1.5,
        "listener": "fleet",
        "reason": "path",
        "status": 404,
        "certificate": 'al"der\n',
        "path": "",
    }
    assert lines[0] == expected
    assert lines[-1]["num_unwritten"] == 100
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_a_log_that_cannot_be_written_is_an_error():
    with pytest.raises(ConfigError, match=r"log\.file"):
        RefusalLog(Path("/nowhere/log"), wall_clock=lambda: 0.0, clock=lambda: 0.0)


def test_defaults_let_flowers_pieces_pass():
    assert config().fleet.max_body_mib == 8
    assert config().fleet.max_body_mib << 20 > 5_242_880


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operators-ca": "sites-ca"}, "CAs of their own"),
        ({"127.0.0.1:3": "127.0.0.1:2"}, "listeners of their own"),
        ({"check_every_s_IS_0.5": "check_every_s = 60"}, "members.check_every_s"),
        ({"[log]": "[log]\nlevel = 1"}, "log.level"),
        ({"127.0.0.1:1": "127.0.0.1"}, "host:port"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_ca_that_signed_the_other_ca_is_refused(tmp_path):
    pki = Pki(tmp_path)
    tls.check_apart(tmp_path / "sites-ca.pem", tmp_path / "operators-ca.pem")
    for first, second in (("root", "sites"), ("sites", "root"), ("sites", "sites")):
        with pytest.raises(ConfigError, match="separate them"):
            tls.check_apart(tmp_path / f"{first}-ca.pem", tmp_path / f"{second}-ca.pem")
    assert pki.root


def test_a_gateway_whose_authorities_are_not_apart_does_not_start(tmp_path):
    Pki(tmp_path)
    (tmp_path / "operators-ca.pem").write_bytes((tmp_path / "sites-ca.pem").read_bytes())
    with pytest.raises(ConfigError, match="a certificate of one CA would pass for the other's"):
        serve.run(config(**{"/keys": str(tmp_path)}))


def test_a_listener_takes_tls_1_3_only_and_asks_for_a_certificate(tmp_path):
    pki = Pki(tmp_path)
    pki.issue("gateway", pki.servers, host="127.0.0.1")
    files = {"certificate_file": tmp_path / "gateway.pem", "key_file": tmp_path / "gateway.key"}
    context = tls.server_context(**files, ca_file=tmp_path / "sites-ca.pem", on_failure=print)
    assert (context.minimum_version, context.verify_mode) == (ssl.TLSVersion.TLSv1_3, ssl.CERT_REQUIRED)
    (tmp_path / "gateway.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        tls.server_context(**files, ca_file=tmp_path / "sites-ca.pem", on_failure=print)


def test_the_client_of_the_superlink_takes_nothing_from_outside():
    client = proxy.connect("127.0.0.1:1", context=ssl.create_default_context())
    assert (client.follow_redirects, client.trust_env) == (False, False)


def test_an_address_that_is_taken_is_an_error_of_one_line(tmp_path):
    pki = Pki(tmp_path)
    pki.issue("gateway", pki.servers, host="127.0.0.1")
    pki.issue("alder", pki.sites)
    pki.issue("olga", pki.operators)
    pki.write_roster(sites=("alder",), operators=("olga",))
    for name in ("revoked.txt", "ca.pem"):
        (tmp_path / name).write_bytes((tmp_path / "root-ca.pem").read_bytes() if name == "ca.pem" else b"")
    with socket.socket() as taken, socket.socket() as other:
        for held in (taken, other):
            held.bind(("127.0.0.1", 0))
        taken.listen()
        port, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        text = SETTINGS.format(superlink="127.0.0.1:1", keys=tmp_path, fleet=free, control=port, bundles=[], **LIMITS)
        with pytest.raises(
            ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*choose another with control\.listen"
        ):
            serve.run(settings.parse(text, name="GATEWAY.toml"))
